"""Modules that a float64 model computes in float32 by its own code: in its trace they are computed in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter
from ..adapters.paths import below
from ..adapters.spread import Spread


def compute_widely(adapter: Adapter, index: int, undo: ExitStack) -> None:
    """Hook up such modules of one layer. The prompts go through the model one by one."""
    kind, block = adapter.kind(index), adapter.block(index)
    for part in ("attention_conv", "mlp_conv"):
        module = adapter.module(index, part)
        if module is not None:
            undo.callback(module.register_forward_hook(_along(Spread(module))).remove)
    if adapter.is_mixture(index) and kind.experts is not None and kind.experts.always is not None:
        held, declared = below(block, kind.experts.always), kind.experts
        names = (declared.gate, str(declared.up), declared.down)

        def always(module: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            """Return what the experts that all positions are sent to give together."""
            x, weights = (*args, *kwargs.values())
            gate, up, down = (getattr(module, name) for name in names)
            acts = module.act_fn(torch.einsum("sid,...d->...si", gate, x)) * torch.einsum("sid,...d->...si", up, x)
            acts = acts * weights.view(*x.shape[:-1], len(gate), 1)
            return torch.einsum("sdi,...si->...d", down, acts)

        undo.callback(held.register_forward_hook(always, with_kwargs=True).remove)


def _along(spread: Spread) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return spread.along(args[0][0])[None]  # (1, T, D)

    return hook
