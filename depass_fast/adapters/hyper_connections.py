"""Hyper-connections (DeepSeek V4, Hunyuan 4): every branch reads a sum of the streams and writes to all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .family import Path
from .paths import below
from .streams import LayerStreams, SideMap, Streams, StreamStep, Watch, side_by_side_streams

# the weights (1, T, n) of the sum that a module of hyper-connections reads, given it and the streams (1, T, n, D)
Pre = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class HyperConnections(Streams):
    """``count`` streams, mixed by modules: ``attention`` and ``mlp`` below a layer, ``head`` below the decoder.

    The modules are called with the streams (1, T, n, D). Those of a layer return what `post` writes (1, T, n) first;
    with ``mixes`` they return `comb` (1, T, n, n) second, of which the transpose mixes the streams, and without it the
    streams stay as they are. ``pre`` and ``head_pre`` return the weights (1, T, n) that a module reads by.
    """

    count: int
    pre: Pre
    head_pre: Pre
    mixes: bool = True
    attention: Path = "attn_hc"
    mlp: Path = "ffn_hc"
    head: Path = "hc_head"

    def numbers(self) -> tuple[int, int]:
        n = self.count
        return 2 * (n + n * n * self.mixes), 2 * n

    def end_numbers(self) -> tuple[int, int]:
        return 0, self.count

    def watches(self, block: nn.Module) -> Sequence[tuple[nn.Module, Watch]]:
        return [
            (module := below(block, self.attention), self._watch(module, "attention", "streams_pre")),
            (module := below(block, self.mlp), self._watch(module, "mlp", "streams_mid")),
        ]

    def _watch(self, module: nn.Module, branch: str, streams: str) -> Watch:
        def watch(args: tuple, kwargs: dict[str, Any], output: Any) -> dict[str, Tensor]:
            found = {streams: side_by_side_streams(args[0], -2)}
            found[f"{branch}_read"] = self.pre(module, args[0]).detach().flatten(0, 1)
            found[f"{branch}_write"] = output[0].detach().to(args[0].dtype).flatten(0, 1)
            if self.mixes:
                found[f"{branch}_mix"] = output[1].detach().to(args[0].dtype).transpose(-1, -2).flatten(0, 1)
            return found

        return watch

    def layer(self, block: nn.Module, record: dict[str, Any], side: SideMap | None) -> tuple[LayerStreams, Tensor]:
        steps = [
            StreamStep(record[f"{branch}_read"], record.get(f"{branch}_mix"), record[f"{branch}_write"])
            for branch in ("attention", "mlp")
        ]
        return LayerStreams(*steps), record["streams_mid"]

    def end(self, decoder: nn.Module, last: nn.Module) -> tuple[nn.Module, Watch]:
        module = below(decoder, self.head)

        def watch(args: tuple, kwargs: dict[str, Any], output: Any) -> dict[str, Tensor]:
            read = self.head_pre(module, args[0]).detach().flatten(0, 1)
            return {"streams_final": side_by_side_streams(args[0], -2), "end_read": read}

        return module, watch


def normed_first(weight: str, base: str, scale: str) -> Pre:
    """DeepSeek V4's weights: those of a linear map of the normed streams. Arguments are names of its tensors."""

    def pre(module: Any, x: Tensor) -> Tensor:
        mixes = nn.functional.linear(module.input_norm(x.flatten(2).float()), getattr(module, weight).float())
        return _sigmoid(module, mixes, base, scale)

    return pre


def normed_last(weight: str, base: str, scale: str) -> Pre:
    """Hunyuan 4's: the norm's scale multiplies what the linear map gives. Arguments as of :func:`normed_first`."""

    def pre(module: Any, x: Tensor) -> Tensor:
        flat = x.flatten(2).float()
        mixes = nn.functional.linear(flat, getattr(module, weight).float()) * module.input_norm(flat)
        return _sigmoid(module, mixes, base, scale)

    return pre


def _sigmoid(module: Any, mixes: Tensor, base: str, scale: str) -> Tensor:
    """The weights of a sum of n streams, from the first n of ``mixes`` (1, T, C).

    The module at the end (its epsilon is `eps`) computes in float32. Those of a layer add a bias of the model's dtype.
    """
    n, held = module.hc_mult, [getattr(module, name) for name in (base, scale)]
    if not hasattr(module, "hc_eps"):
        return torch.sigmoid(mixes[..., :n] * held[1].float()[0] + held[0].float()[:n]) + module.eps
    return torch.sigmoid(mixes[..., :n] * held[1][0] + held[0][:n]) + module.hc_eps
