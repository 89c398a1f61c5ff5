"""The provenance of what is computed with a model now, for its results."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from ..adapters import Adapter
from ..adapters.tuned import active_adapters
from ..results.provenance import Provenance
from ..version import __version__


def provenance_of(adapter: Adapter) -> Provenance:
    """Return the names of the model and of its adapters, and the versions of the packages."""
    config: Any = adapter.model.config
    return Provenance(
        model=getattr(config, "_name_or_path", None) or None,
        revision=getattr(config, "_commit_hash", None),
        model_type=config.model_type,
        model_class=type(adapter.model).__name__,
        adapters=active_adapters(adapter.model),
        quantisation=_quantisation(getattr(config, "quantization_config", None)),
        depass_fast=__version__,
        torch=str(torch.__version__),
        transformers=transformers.__version__,
    )


def _quantisation(config: Any) -> str | None:
    """Return the method of a config of quantisation, which is a dict or an object; None without one."""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))
