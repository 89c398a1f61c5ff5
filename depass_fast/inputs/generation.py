"""Generation by ``model.generate``: one prompt, checked, with a bar of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter
from ..runtime.progress import ProgressBar, progress_bar


def generate(adapter: Adapter, ids: Tensor, progress: bool = True, **arguments: Any) -> tuple[Tensor, int]:
    """Run ``model.generate`` on one prompt (N,). Returns all ids, on the CPU, and N.

    ``progress`` shows a bar of the tokens; ``arguments`` are those of ``model.generate``.

    Raises:
        ValueError: several sequences are asked for, or more tokens than fit into the model's context.
    """
    if arguments.get("num_return_sequences") not in (None, 1):
        raise ValueError("num_return_sequences must be 1: one sequence is decomposed.")
    new, limit = arguments.get("max_new_tokens"), adapter.context_length
    if new is not None and limit is not None and len(ids) + new > limit:
        raise ValueError(
            f"max_new_tokens: {new} after a prompt of {len(ids)} tokens pass the model's context of {limit}."
        )
    prompt = ids[None].to(adapter.device)
    arguments = {"attention_mask": torch.ones_like(prompt)} | arguments | {"return_dict_in_generate": False}
    most = (arguments.get("max_length") or 0) - len(ids) if new is None else new
    with progress_bar("tokens", most, progress) as bar:
        if bar is not None:
            arguments["stopping_criteria"] = [*(arguments.get("stopping_criteria") or ()), _ticking(bar)]
        model: Any = adapter.model
        return model.generate(prompt, **arguments)[0].cpu(), len(ids)


def _ticking(bar: ProgressBar) -> Callable[..., Tensor]:
    """A stopping criterion that never stops, and moves a bar at every token."""

    def tick(input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        bar.finish()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return tick
