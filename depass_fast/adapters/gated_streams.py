"""Gated residual streams (Qwen 4): a branch reads their mean, each normed and gated by channel, and writes to all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from .family import Path
from .maps import Norm
from .paths import below, below_or_none
from .streams import LayerStreams, SideMap, Streams, StreamStep, Watch


@dataclass(frozen=True)
class GatedStreams(Streams):
    """``count`` streams of ``width``, read by modules: ``attention`` and ``mlp`` below a layer, ``head`` at the end.

    They are called with the streams side by side (1, T, n·D). A branch's input is
    Σ_i g[t, i] ⊙ γ[i] s[t, i] X[t, i] / n, with a gate g in (0, 1) and the scale s of a norm of every stream. Those
    of a layer return it, the streams, and what the branch's output is multiplied by in each, (1, T, n). ``embeddings``
    is a layer's module that :meth:`enters`.
    """

    count: int
    width: int
    attention: Path = "attn_hyper_connection"
    mlp: Path = "mlp_hyper_connection"
    head: Path = "hyper_connection_mixer"
    embeddings: Path = "ple"

    def numbers(self) -> tuple[int, int]:
        return 2 * self.count * (self.width + 1), 0

    def end_numbers(self) -> tuple[int, int]:
        return self.count * self.width, 0

    def enters(self, block: nn.Module) -> nn.Module | None:
        return below_or_none(block, self.embeddings)

    def watches(self, block: nn.Module) -> Sequence[tuple[nn.Module, Watch]]:
        return [
            (module := below(block, self.attention), self._watch(module, "attention", "streams_pre")),
            (module := below(block, self.mlp), self._watch(module, "mlp", "streams_mid")),
        ]

    def _watch(self, module: nn.Module, branch: str, streams: str) -> Watch:
        def watch(args: tuple, kwargs: dict[str, Any], output: Any) -> dict[str, Tensor]:
            x, write = args[0].detach().flatten(0, 1), output[2].detach().flatten(0, 1)
            return {streams: x, f"{branch}_read": self._read(module, x), f"{branch}_write": write}

        return watch

    def _read(self, module: Any, x: Tensor) -> Tensor:
        """Return the factors (T, n, D) of streams (T, n·D) that a module reads by, in the model's dtype."""
        gate = silu(module.input_mix_weight_down(module.hc_norm(x)) / self.count)
        gate = torch.sigmoid(module.input_mix_weight_up(gate)).unflatten(-1, (self.count, -1))
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.count, -1))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + module.hc_norm.eps) / self.count
        weight = (1.0 + module.hc_norm.weight.detach().to(wide)).unflatten(-1, (self.count, -1))
        return (gate.to(wide) * scale * weight).to(x).detach()

    def layer(self, block: nn.Module, record: dict[str, Any], side: SideMap | None) -> tuple[LayerStreams, Tensor]:
        steps = (StreamStep(record[f"{name}_read"], None, record[f"{name}_write"]) for name in ("attention", "mlp"))
        return LayerStreams(*steps, entering=record.get("entering")), record["streams_mid"]

    def own_norms(self, decoder: nn.Module, blocks: Sequence[nn.Module]) -> list[tuple[nn.Module, Norm]]:
        readers: list[Any] = [below(block, path) for block in blocks for path in (self.attention, self.mlp)]
        readers.append(below(decoder, self.head))
        return [
            (one.hc_norm, StreamNorms(1.0 + one.hc_norm.weight, one.hc_norm.eps, size=self.width)) for one in readers
        ]

    def end(self, decoder: nn.Module, last: nn.Module) -> tuple[nn.Module, Watch]:
        module = below(decoder, self.head)

        def watch(args: tuple, kwargs: dict[str, Any], output: Any) -> dict[str, Tensor]:
            x = args[0].detach().flatten(0, 1)
            return {"streams_final": x, "end_read": self._read(module, x)}

        return module, watch


@dataclass(frozen=True)
class StreamNorms(Norm):
    """An RMSNorm of every stream of ``size`` by itself: only its output is known, no scale for all of them."""

    size: int = 0

    def normed(self, x: Tensor) -> Tensor:
        return self._weighted(rms_norm(x.unflatten(-1, (-1, self.size)), (self.size,), eps=self.eps).flatten(-2))
