"""AltUp, LAuReL and the end of Gemma 3n: n streams, of which every layer works on the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layer_mlps import plain_norm
from .maps import Linear, Norm
from .paths import below
from .streams import LayerStreams, SideMap, Streams, StreamStep, Watch, side_by_side_streams

_TINY = 1e-5  # the least mean square of a stream, as the model has it


@dataclass(frozen=True)
class AltUp(Streams):
    """``count`` streams X. A layer predicts P = (1 + C) X, works on a = P[0], and corrects all by what a gained.

    With b = (a + attention(a) + LAuReL(a)) / √2 and c = b + MLP(b), X'[j] = P[j] + k[j] (c - a), and a gate's output is
    added to all streams but the first. C and k come from routers and are frozen. Between attention and MLP there are
    count + 1 streams: P and b.
    """

    count: int

    @property
    def middle(self) -> int:
        return self.count + 1

    def numbers(self) -> tuple[int, int]:
        n = self.count
        return 2 * n * n + 8 * n + 2, 2

    def watches(self, block: nn.Module) -> Sequence[tuple[nn.Module, Watch]]:
        norm = plain_norm(below(block, "laurel.post_laurel_norm"))
        return [
            (block, lambda args, kwargs, output: {"streams_pre": side_by_side_streams(args[0], 0)}),
            (below(block, "altup.prediction_coefs"), _output_as("predicted")),
            (below(block, "altup.correction_coefs"), _output_as("corrected")),
            (
                below(block, "laurel.post_laurel_norm"),
                lambda args, kwargs, output: {"laurel_scale": norm.scale(args[0].detach().flatten(0, -2))},
            ),
        ]

    def layer(self, block: nn.Module, record: dict[str, Any], side: SideMap | None) -> tuple[LayerStreams, Tensor]:
        n, x = self.count, record["streams_pre"]
        predicted = record["predicted"].unflatten(-1, (n, n)) + torch.eye(n).to(x)  # (T, n, n): P = predicted X
        gain = record["corrected"] + 1.0  # k, (T, n)
        one = predicted.new_zeros(len(x), n + 1)
        one[:, n] = 1.0
        half = 1.0 / math.sqrt(2.0)
        assert side is not None
        attention = StreamStep(
            read=predicted[:, 0],
            mix=torch.cat([predicted, half * predicted[:, :1]], 1),
            write=half * one,
            side=side.scales(record["resid_pre"], record["laurel_scale"]),
        )
        innovation = one.clone()  # b - a
        innovation[:, 0] = -1.0
        mix = torch.eye(n, n + 1).to(x) + gain[:, :, None] * innovation[:, None]
        first = one.new_tensor([1.0] + [0.0] * (n - 1)).expand(len(x), n)
        streams = LayerStreams(attention, StreamStep(one, mix, gain), StreamStep(first, None, 1.0 - first))
        return streams, torch.cat([attention.passes(x)[:, : -record["resid_mid"].shape[1]], record["resid_mid"]], 1)

    def end(self, decoder: nn.Module, last: nn.Module) -> tuple[nn.Module, Watch]:
        weights = self.maps(decoder)

        def watch(args: tuple, kwargs: dict[str, Any], output: Any) -> dict[str, Tensor]:
            streams = output.detach().flatten(1, -2)  # (n, T, D)
            size = streams[0].square().mean(-1).sqrt()
            factors = [torch.ones_like(size)]
            for one, weight in zip(streams[1:], weights[1:], strict=True):
                assert weight is not None
                factors.append(size / (one @ weight.to(one).T).square().mean(-1).clamp(min=_TINY).sqrt())
            final = side_by_side_streams(output, 0)
            return {"streams_final": final, "end_read": torch.stack(factors, 1) / self.count}

        return last, watch

    def maps(self, decoder: nn.Module) -> tuple[Tensor | None, ...]:
        return None, *(Linear(one).weight for one in below(decoder, "altup_unembed_projections"))

    def norms(self, block: nn.Module) -> list[nn.Module]:
        return [below(block, "laurel.post_laurel_norm")]

    def side(self, block: nn.Module, norm: Norm) -> SideMap:
        left, right = (Linear(below(block, f"laurel.{name}")) for name in ("linear_left", "linear_right"))
        return SideMap(norm, left, right, plain_norm(below(block, "laurel.post_laurel_norm")))


def _output_as(name: str) -> Watch:
    return lambda args, kwargs, output: {name: output.detach().flatten(0, -2)}
