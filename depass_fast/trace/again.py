"""The model run once more, as it is: the logits of the next token."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from ..adapters import Adapter


def next_logits(adapter: Adapter, ids: Tensor) -> Tensor:
    """Return the logits (B, V) of the next token after ids (B, N), in the model's dtype, by one forward pass."""
    model: Any = adapter.model
    given: dict[str, Any] = dict(adapter.cache_choice)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = 1
    return model(ids.to(adapter.device), **given).logits[:, -1]
