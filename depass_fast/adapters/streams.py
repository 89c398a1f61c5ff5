"""Residual streams that are several wide: what a branch reads of them, how they are mixed, what it writes to them.

With everything else frozen these are linear maps by position (DESIGN.md section 10, *Several streams*). n streams of
width D lie side by side, as one residual stream of width n·D.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .maps import Linear, Norm

# called with a module's arguments, named arguments and output, it returns tensors (T, ...) by their names in a record
Watch: TypeAlias = Callable[[tuple, dict[str, Any], Any], dict[str, Tensor]]


@dataclass(frozen=True)
class StreamStep:
    """The frozen maps of one branch at T positions: n streams in front of it, m behind it.

    The branch reads x = Σ_i ``read``[t, i] X[t, i] and gives y; ``read`` may be by channel, (T, n, D). Behind it the
    streams are X'[t, j] = Σ_i ``mix``[t, j, i] X[t, i] + ``write``[t, j] y[t]. ``mix`` None leaves the streams as they
    are. ``side`` (T, 2) are the scales of the two norms of a :class:`SideMap`, whose output is added to y.

    A branch may read r such sums side by side, r·D wide (Zamba): ``read`` is (T, r, n, 1) then.
    """

    read: Tensor  # (T, n), (T, n, D) or (T, r, n, 1)
    mix: Tensor | None  # (T, m, n)
    write: Tensor  # (T, m)
    side: Tensor | None = None

    @property
    def is_by_channel(self) -> bool:
        """True if what is read of a stream has a factor for every channel: at a row that is as much as the streams."""
        return self.read.ndim == 3

    def at(self, rows: Tensor | slice | None, reads: bool = True) -> StreamStep:
        """The same at some positions (N,), in the order given; None: at all. Without ``reads`` it cannot read there."""
        if rows is None:
            return self
        mix, side = (None if x is None else x[rows] for x in (self.mix, self.side))
        return StreamStep(self.read[rows] if reads else self.read[:0], mix, self.write[rows], side)

    def to(self, like: Tensor) -> StreamStep:
        """The same in the dtype and on the device of ``like``."""
        mix, side = (None if x is None else x.to(like) for x in (self.mix, self.side))
        return StreamStep(self.read.to(like), mix, self.write.to(like), side)

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [x for x in (self.read, self.mix, self.write, self.side) if x is not None]

    @property
    def count(self) -> int:
        """n, the number of streams in front of the branch."""
        return self.read.shape[2 if self.read.ndim == 4 else 1]

    # -- forwards, at the positions of x ------------------------------------------------------------------------

    def reads(self, x: Tensor) -> Tensor:
        """Return what the branch reads of streams (N, n·D): (N, D), or (N, r·D)."""
        apart = _apart(x, self.count)
        if self.read.ndim == 2:
            return torch.bmm(self.read[:, None].to(x), apart).flatten(1)
        if self.is_by_channel:
            return (self.read.to(x) * apart).sum(-2)
        return torch.bmm(self.read[..., 0].to(x), apart).flatten(1)

    def passes(self, x: Tensor) -> Tensor:
        """Return what is left of streams (N, n·D) behind the branch, without what it gives: (N, m·D)."""
        return x if self.mix is None else torch.bmm(self.mix.to(x), _apart(x, self.mix.shape[2])).flatten(1)

    def writes(self, y: Tensor) -> Tensor:
        """Return what a branch's output (N, ..., D) adds to the streams: (N, ..., m·D)."""
        weight = self.write.to(y).view(len(y), *[1] * (y.ndim - 2), -1, 1)
        return (weight * y[..., None, :]).flatten(-2)

    def mixed(self, x: Tensor) -> Tensor:
        """A part of the streams (N, M, n·D) behind the branch, without what that gives: (N, M, m·D)."""
        if self.mix is None:
            return x
        return torch.einsum("nji,nmid->nmjd", self.mix.to(x), _apart(x, self.mix.shape[2])).flatten(-2)

    # -- and backwards ------------------------------------------------------------------------------------------

    def reads_back(self, y: Tensor) -> Tensor:
        """Take gradients (..., N, D) of what the branch reads back to the streams: (..., N, n·D)."""
        read = self.read.to(y)
        if read.ndim == 4:
            return torch.einsum("nri,...nrd->...nid", read[..., 0], _apart(y, read.shape[1])).flatten(-2)
        read = read if self.is_by_channel else read[..., None]
        return (read * y[..., None, :]).flatten(-2)

    def passes_back(self, y: Tensor) -> Tensor:
        """Take gradients (..., N, m·D) of the streams behind the branch back to those in front of it: (..., N, n·D)."""
        if self.mix is None:
            return y
        return torch.einsum("nji,...njd->...nid", self.mix.to(y), _apart(y, self.mix.shape[1])).flatten(-2)

    def writes_back(self, y: Tensor) -> Tensor:
        """Take gradients (..., N, m·D) of the streams back to what the branch gives: (..., N, D)."""
        return torch.einsum("nj,...njd->...nd", self.write.to(y), _apart(y, self.write.shape[1]))


def _apart(x: Tensor, count: int) -> Tensor:
    """Streams (..., n·D) as (..., n, D)."""
    return x.unflatten(-1, (count, -1))


@dataclass(frozen=True)
class LayerStreams:
    """The frozen maps of a layer's branches, None for one that it lacks; ``gate``: of the MLP that follows the others.

    ``entering`` (T, n·D) is what the next layer's own embeddings add to the streams behind this one, None without such.
    """

    attention: StreamStep
    mlp: StreamStep | None = None
    gate: StreamStep | None = None
    entering: Tensor | None = field(default=None, kw_only=True)

    def each(self) -> list[StreamStep]:
        """All that the layer has, in their order."""
        return [step for step in (self.attention, self.mlp, self.gate) if step is not None]

    def tensors(self) -> list[Tensor]:
        """All that they hold."""
        own = [] if self.entering is None else [self.entering]
        return [x for step in self.each() for x in step.tensors()] + own

    def cut(self, cut: Callable[[Tensor], Tensor]) -> LayerStreams:
        """The same with every tensor (T, ...) cut."""
        made = []
        for step in self.each():
            mix, side = (None if x is None else cut(x) for x in (step.mix, step.side))
            made.append(StreamStep(cut(step.read), mix, cut(step.write), side))
        return LayerStreams(*made, entering=None if self.entering is None else cut(self.entering))


@dataclass(frozen=True)
class SideMap:
    """A linear map beside attention: z + the ``output`` norm of ``right`` (``left`` z), z = ``norm`` of its input."""

    norm: Norm
    left: Linear
    right: Linear
    output: Norm

    def scales(self, x: Tensor, out_scale: Tensor) -> Tensor:
        """Both norms' scales (T, 2), given what is read (T, D) and that of the second one, (T,)."""
        return torch.stack([self.norm.scale(x).to(out_scale), out_scale], 1)

    def of(self, x: Tensor, scales: Tensor) -> Tensor:
        """Apply it to (N, D), its scales (N, 2) frozen."""
        z = self.norm.apply(x, scales[:, 0])
        y = z @ self.left.weight.to(z).T @ self.right.weight.to(z).T
        return z + self.output.apply(y, scales[:, 1])

    def back(self, y: Tensor, scales: Tensor) -> Tensor:
        """Apply the transpose to gradients (..., N, D)."""
        z = self.output.transposed(y, scales[:, 1]) @ self.right.weight.to(y) @ self.left.weight.to(y)
        return self.norm.transposed(y + z, scales[:, 0])


@dataclass(frozen=True)
class StreamEnd:
    """The way from n streams to what the final norm reads: Σ_i ``read``[t, i] · ``maps``[i] X[t, i].

    ``read`` is (T, n), or (T, n, D) by channel. A map is (D, D), or None for none.
    """

    read: Tensor
    maps: tuple[Tensor | None, ...]

    def of(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """Streams (N, n·D) at positions ``at`` (N,), by default all, as what the final norm reads: (N, D)."""
        total: Tensor | None = None
        for stream, (one, weight) in enumerate(zip(_apart(x, len(self.maps)).unbind(-2), self.maps, strict=True)):
            one = (one if weight is None else one @ weight.to(one).T) * self._factor(stream, at).to(x)
            total = one if total is None else total + one
        assert total is not None
        return total

    def back(self, y: Tensor, at: Tensor) -> Tensor:
        """Take gradients (N, D) of what the final norm reads at positions ``at`` (N,) back: (N, n·D)."""
        each = (y * self._factor(stream, at).to(y) for stream in range(len(self.maps)))
        return torch.cat([one if w is None else one @ w.to(y) for one, w in zip(each, self.maps, strict=True)], 1)

    def _factor(self, stream: int, at: Tensor | None) -> Tensor:
        """Return the factors of one stream at some positions (N,): (N, 1) or (N, D)."""
        read = self.read[:, stream]
        read = read if at is None else read[at.to(read.device)]
        return read if read.ndim == 2 else read[:, None]

    def to(self, device: torch.device) -> StreamEnd:
        """The same on a device."""
        return replace(self, read=self.read.to(device))


class Streams(ABC):
    """A family's way of mixing ``count`` streams, of which there may be ``middle`` between attention and MLP.

    What is frozen is watched in the forward pass: a record holds, by their names, what :meth:`watches` see. In it
    `streams_pre` (T, n·D) are the streams that enter the layer, once it is :meth:`gathered`. Where layers differ, each
    kind has its own way, and that of the family says what is the same for all.
    """

    count: int

    @property
    def middle(self) -> int:
        """The number of streams between attention and MLP."""
        return self.count

    @abstractmethod
    def numbers(self) -> tuple[int, int]:
        """The numbers per position of a layer's frozen maps: in the model's dtype, and in float32 or wider."""

    def enters(self, block: nn.Module) -> nn.Module | None:
        """The module of a layer's own embeddings, whose output (1, T, n·D) is added to the streams in front of it."""
        return None

    def end_numbers(self) -> tuple[int, int]:
        """Those of the end of the streams, in the same dtypes."""
        return self.count, 0

    @abstractmethod
    def watches(self, block: nn.Module) -> Sequence[tuple[nn.Module, Watch]]:
        """The modules of a layer that a trace looks at, and what it keeps of a call of each."""

    @property
    def gathered_streams(self) -> int:
        """The number of streams of a layer that are copied when the forward pass is over."""
        return 0

    def gathered(self, record: dict[str, Any]) -> None:  # noqa: B027 (a hook)
        """Make `streams_pre` in a layer's record, where several modules were watched for it."""

    @abstractmethod
    def layer(
        self, block: nn.Module, record: dict[str, Any], side: SideMap | None
    ) -> tuple[LayerStreams, Tensor | None]:
        """A layer's frozen maps, of what was recorded, and the streams between attention and MLP: (T, m·D).

        These are None in a layer without an MLP.
        """

    def own_norms(self, decoder: nn.Module, blocks: Sequence[nn.Module]) -> list[tuple[nn.Module, Norm]]:
        """Norms in the modules that read the streams, for a float64 model to compute in float64."""
        return []

    @abstractmethod
    def end(self, decoder: nn.Module, last: nn.Module) -> tuple[nn.Module, Watch]:
        """The module where the streams end, and what is kept of its call: `streams_final` (T, n·D) and `end_read`.

        ``decoder`` is the model without its unembedding, ``last`` its last layer.
        """

    def maps(self, decoder: nn.Module) -> tuple[Tensor | None, ...]:
        """The maps of :class:`StreamEnd`."""
        return (None,) * self.count

    def norms(self, block: nn.Module) -> list[nn.Module]:
        """The norms of a layer that components pass beside its branches."""
        return []

    def side(self, block: nn.Module, norm: Norm) -> SideMap | None:
        """The map beside a layer's attention, which reads through ``norm``; None without one."""
        return None


def side_by_side_streams(x: Tensor, axis: int) -> Tensor:
    """Streams of one packed sequence, with the streams at ``axis``, 0 or -2 of (..., T, ..., D), as (T, n·D)."""
    if axis == 0:
        n, width = x.shape[0], x.shape[-1]
        return x.detach().reshape(n, -1, width).transpose(0, 1).flatten(1)
    return x.detach().flatten(-2).flatten(0, -2)
