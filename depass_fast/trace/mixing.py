"""A frozen recurrence and all that stands between the projection of values and the output projection.

Values go through a gate, a convolution along the positions and an activation, all frozen, then through the recurrence,
then through the factors of the heads' outputs: linear in the values, and causal (DESIGN.md section 10). For short
prompts the recurrence is one signed matrix per head, made anew in every layer. For long ones it runs over the values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..adapters import Attention
from .attention import span_probabilities
from .record import AttentionTrace, RecurrenceTrace
from .scan import Steps, parts_of_heads, scan, scan_back

LONGEST_MATRIX = 512  # positions up to which a matrix per head costs less than running over the values
_NEAR = 1 << 17  # elements that stay in a core's cache through several passes
_ALL = slice(None)
MATRIX = 1 << 26  # elements of the matrices of all heads, beyond which none is made
LOOKED, LOOKED_CUDA = 1 << 22, 1 << 26  # probabilities beside a recurrence that are held at once


class FrozenMixing:
    """The recurrence of one layer on one prompt, at the packed positions ``span``.

    It computes in ``dtype``. The values that are given have passed their projection and the norm in front of it;
    constants have not been added. Values that lack the norm's scale are multiplied by ``scale`` (N,) on the way
    forward.
    """

    def __init__(
        self, weights: Attention, trace: AttentionTrace, span: slice, dtype: torch.dtype, scale: Tensor | None = None
    ) -> None:
        assert trace.recurrence is not None
        self._weights, self._trace, self._span, self._dtype, self._scale = weights, trace, span, dtype, scale
        self._frozen: RecurrenceTrace = trace.recurrence
        self.heads, self.positions = weights.n_heads, span.stop - span.start
        self._looking = trace if self._frozen.decay is None else trace.beside  # what has the probabilities
        beside = 0 if trace.beside is None else trace.beside.q.shape[1]
        self._softmax = self.heads if self._frozen.decay is None else beside  # first heads
        self._wide = torch.promote_types(dtype, torch.float32)
        self._kept_factors: list[Tensor] | None = None

    def forward(self, values: Tensor, start: int = 0) -> Tensor:
        """Return what heads give for values (N - start, B, H·d) of positions from ``start`` on: the same shape."""
        factors = self._factors(start) if self.is_short else self._make_factors(start, self._scale)
        values = values.unflatten(2, (self.heads, -1))
        x = values.new_empty(self.heads, *values.shape[:2], values.shape[3])
        per = self.heads if x.is_cuda else max(1, _NEAR // max(1, x[0].numel()))
        for first in range(0, self.heads, per):  # all steps of a few heads, while they are in the cache
            heads = slice(first, first + per)
            self._shape(values[:, :, heads], [f[:, :, heads] for f in factors], x[heads].permute(1, 2, 0, 3))
        return self._given(self.mixed(x.flatten(2), start), start)

    def forward_single(self, values: Tensor, at: Tensor, start: int) -> Tensor:
        """Return what heads give at positions from ``start`` on for values (B, H·d) that stand at one position each.

        These positions are ``at`` (B,). The prompt is a short one. A convolution carries a value to the next few
        positions, and no other column of the matrix is read.
        """
        last, factors = self.positions, self._factors(0)
        reached = at[:, None] + torch.arange(len(factors), device=at.device)  # (B, K)
        shown = reached.clamp_max(last - 1)
        x = torch.stack([factor[shown[:, back], 0] for back, factor in enumerate(factors)], 1)  # (B, K, H, d)
        x = x * values.view(len(values), 1, self.heads, -1) * (reached < last)[..., None, None]
        x = x.permute(2, 0, 1, 3)  # (H, B, K, d)
        columns = self._all[:, start:].index_select(2, shown.flatten()).unflatten(2, shown.shape).transpose(1, 2)
        y = (columns @ x).transpose(1, 2)  # (H, N', B, d)
        return self._given(y.flatten(2), start)

    @property
    def takes_single(self) -> bool:
        """True if :meth:`forward_single` can be called: the recurrence is a matrix, with no softmax beside it."""
        return self._has_matrix and not self._softmax

    @property
    def is_short(self) -> bool:
        """True if the recurrence may be a matrix per head."""
        return self.positions <= LONGEST_MATRIX

    def forward_shaped(self, x: Tensor, start: int = 0) -> Tensor:
        """Return the same for shaped values."""
        return self._given(self.mixed(self._to_heads(x), start), start)

    def back(self, gradients: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the gradients (N, B, H·d) of values, given those of what the heads give.

        The second are the scores (N, B, H) of what heads take from every position, given its ``values`` (N, H·d).
        """
        y = self._to_heads(self._scaled_out(gradients, 0))
        of_shaped = self._by_head(self.mixed(y, 0, transposed=True), self.positions)
        out, found = self._times(of_shaped, self._trace.value_ratio, 0), None
        if values is not None:
            found = (of_shaped * self.shaped(values[:, None])).unflatten(-1, (self.heads, -1)).sum(3)
        return self._times(self._convolved(out, _ALL, transposed=True), self._frozen.in_ratio, 0), found

    def shaped(self, values: Tensor, start: int = 0) -> Tensor:
        """Return values (N - start, B, H·d) behind gate, convolution and activation."""
        x = values.unflatten(2, (self.heads, -1))
        return self._shape(x, self._make_factors(start, None), torch.empty_like(x)).flatten(2)

    def _shape(self, x: Tensor, factors: list[Tensor], out: Tensor) -> Tensor:
        """Write shaped values into ``out`` (N', B, h, d), given x of that shape and the ``factors`` of its channels."""
        torch.mul(x, factors[0], out=out)
        for back in range(1, min(len(factors), len(x))):
            out[back:].addcmul_(x[:-back], factors[back][back:])
        return out

    def _factors(self, start: int) -> list[Tensor]:
        """Return the factors of values on their way forward, kept for the next block."""
        if self._kept_factors is None:
            self._kept_factors = self._make_factors(0, self._scale)
        return [factor[start:] for factor in self._kept_factors]

    def _make_factors(self, start: int, scale: Tensor | None) -> list[Tensor]:
        """Return by what a value is multiplied that is read 0, 1, ... positions later: (N - start, 1, H, d) each.

        This is its scale and gate, the convolution's tap, and the activation's ratio at the position that reads.
        """
        conv, n, here = self._weights.conv, self.positions - start, slice(self._span.start + start, self._span.stop)
        before, after, of = (
            self._frozen.in_ratio,
            self._trace.value_ratio,
            self._trace.q.new_empty(0, dtype=self._dtype),
        )
        one = of.new_ones(n, 1) if scale is None else scale[start:, None].to(of)
        one = one if before is None else one * before[here].to(of)
        taps = of.new_ones(1, 1) if conv is None else conv.weight[:, 0].to(of).flip(1).T  # (K, C)
        out = []
        for back in range(min(len(taps), n)):
            factor = of.new_zeros(n, self.heads * self._weights.head_dim)
            factor[back:] = one[: n - back] * taps[back]
            factor = factor if after is None else factor.mul_(after[here].to(of))
            out.append(factor.view(n, 1, self.heads, -1))
        return out

    def _given(self, y: Tensor, start: int) -> Tensor:
        """Return what heads give (N', B, H·d) for mixed values (H, N', B·d)."""
        ratio, n, d = self._trace.out_ratio, y.shape[1], self._weights.head_dim
        if ratio is None:
            return self._by_head(y, n)
        y = y.view(self.heads, n, -1, d).permute(1, 2, 0, 3)
        out, here = y.new_empty(y.shape), ratio[self._span.start + start : self._span.stop, None].to(y)
        return torch.mul(y, here.unflatten(2, (self.heads, d)), out=out).flatten(2)

    def convolved(self, values: Tensor, start: int = 0) -> Tensor:
        """Return values (N - start, B, H·d) behind gate and convolution: in front of the activation."""
        return self._convolved(self._times(values, self._frozen.in_ratio, start), _ALL)

    def mixed(self, x: Tensor, start: int, transposed: bool = False) -> Tensor:
        """Apply the recurrence, or its transpose, to shaped values (H, N - start, F); and the softmax beside it."""
        if self._softmax:
            looked = self._looked(x[: self._softmax], start, transposed)
            if not self._recurrent:
                return looked
            return torch.cat([looked, self._recurred(x[self._softmax :], start, transposed)])
        return self._recurred(x, start, transposed)

    def _looked(self, x: Tensor, start: int, transposed: bool) -> Tensor:
        """Apply the probabilities of the first heads, some queries at a time, or their transpose."""
        n, out = self.positions, torch.zeros_like(x)
        size = n if self.is_short else max(1, (LOOKED_CUDA if x.is_cuda else LOOKED) // (self._softmax * n))
        for first in range(start, n, size):
            queries = slice(first, min(first + size, n))
            p = (self._looks[:, first:] if self.is_short else self._probabilities(queries)).to(x)
            at = slice(first - start, queries.stop - start)
            if transposed:
                out += p[..., start:].transpose(1, 2) @ x[:, at]
            else:
                out[:, at] = p[..., start:] @ x
        return out

    def _probabilities(self, queries: slice) -> Tensor:
        assert self._looking is not None
        return span_probabilities(self._looking, self._span, queries, self._wide)

    @cached_property
    def _looks(self) -> Tensor:
        """The probabilities of a short prompt, kept for its next block."""
        return self._probabilities(slice(0, self.positions)).to(self._dtype)

    def _recurred(self, x: Tensor, start: int, transposed: bool) -> Tensor:
        if self._pays(x.shape[2]):
            matrix = self._all[:, start:, start:]
            return (matrix.transpose(1, 2) if transposed else matrix) @ x
        out, frozen = torch.empty_like(x), self._frozen
        by_channel = frozen.rates is not None or (frozen.decay is not None and frozen.decay.shape[2] > 1)
        sizes = self._recurrent, x.shape[2], self._trace.k.shape[2]
        run = scan_back if transposed else scan
        for heads in parts_of_heads(*sizes, by_channel, not x.is_cuda):
            how: dict[str, Any] = {"before": frozen.own is not None, "own": self._own(heads, start)}
            run(self._steps(heads, start), frozen.corrects, x[heads], **how, out=out[heads])
        return out

    def _pays(self, columns: int) -> bool:
        """True if a matrix per head costs no more than running over so many values of every head.

        It is made by running over as many as there are positions, so that it has to be kept for the next block.
        """
        return self._has_matrix and (columns >= self.positions or "_all" in self.__dict__)

    @property
    def _has_matrix(self) -> bool:
        return self.is_short and self._recurrent * self.positions**2 <= MATRIX

    def _own(self, heads: slice, start: int) -> Tensor | None:
        """Return what some heads give of a value at its own position, beside the state: (h, 1, 1) or (h, N', 1)."""
        own, skip = self._frozen.own, self._frozen.skip
        if own is None:
            return None if skip is None else skip[heads, None, None].to(self._wide)
        return own[self._span.start + start : self._span.stop, heads].T[..., None].to(self._wide)

    def matrix(self, heads: slice) -> Tensor:
        """Return the mixing matrices of some heads of the recurrence, signed and lower triangular: (h, N, N)."""
        one = torch.eye(self.positions, dtype=self._wide, device=self._trace.q.device)
        nothing = torch.finfo(self._wide).tiny ** 0.5  # of a matrix whose entries are about one
        how: dict[str, Any] = {"before": self._frozen.own is not None, "own": self._own(heads, 0)}
        one = one.expand(heads.stop - heads.start, -1, -1)
        return scan(self._steps(heads, 0), self._frozen.corrects, one, nothing, **how).to(self._dtype)

    @cached_property
    def _all(self) -> Tensor:
        return self.matrix(slice(0, self._recurrent))

    @property
    def _recurrent(self) -> int:
        return self.heads - self._softmax

    def _steps(self, heads: slice, start: int) -> Callable[[slice], Steps]:
        """Return what makes the steps of some heads at positions from ``start`` on."""
        first, frozen, of_decay = self._span.start + start, self._frozen, self._frozen.decay
        assert of_decay is not None
        rates = None if frozen.rates is None else frozen.rates[heads, None].to(self._wide)
        kinds = {x.shape[1] for x in (self._trace.q, self._trace.k, of_decay, frozen.write) if x is not None}
        every = torch.arange(heads.start, heads.stop, device=self._trace.q.device)
        shared = {n: every // (self._recurrent // n) for n in kinds}  # heads of so many in groups

        def steps(at: slice) -> Steps:
            at = slice(first + at.start, first + at.stop)

            def of(x: Tensor) -> Tensor:  # (T, Hx, ...) -> (h, C, ...)
                return x[at].to(self._wide).index_select(1, shared[x.shape[1]]).transpose(0, 1)

            decay, write = of(of_decay), None if frozen.write is None else of(frozen.write)
            return Steps(of(self._trace.q), of(self._trace.k), decay if rates is None else decay * rates, write)

        return steps

    def _convolved(self, x: Tensor, channels: slice, transposed: bool = False) -> Tensor:
        """Convolve (N', B, c) along the positions, with nothing before the first; or apply the transpose."""
        conv = self._weights.conv
        if conv is None:
            return x
        taps = conv.weight[channels, 0].to(x)  # (c, K), the last at the position itself
        out = x * taps[:, -1]
        for back in range(1, min(taps.shape[1], len(x))):
            if transposed:
                out[:-back].addcmul_(x[back:], taps[:, -1 - back])
            else:
                out[back:].addcmul_(x[:-back], taps[:, -1 - back])
        return out

    def _scaled_out(self, y: Tensor, start: int) -> Tensor:
        return self._times(y, self._trace.out_ratio, start)

    def _times(self, x: Tensor, ratio: Tensor | None, start: int, channels: slice = _ALL) -> Tensor:
        """Return x (N', B, c) times a ratio (T, C) of some channels."""
        return x if ratio is None else x * ratio[self._span.start + start : self._span.stop, None, channels].to(x)

    def _to_heads(self, x: Tensor) -> Tensor:
        """(N, B, H·d) -> (H, N, B·d)."""
        n, b, _ = x.shape
        return x.view(n, b, self.heads, -1).permute(2, 0, 1, 3).reshape(self.heads, n, -1)

    def _by_head(self, x: Tensor, n: int) -> Tensor:
        """(H, N, B·d) -> (N, B, H·d)."""
        d = self._weights.head_dim
        return x.view(self.heads, n, -1, d).permute(1, 2, 0, 3).flatten(2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, lengths: list[int]) -> Tensor:
    """Convolve (T, C) along the positions of each of the packed prompts of ``lengths``: taps (C, K), bias (C,)."""
    taps = weight.shape[1] - 1
    parts = []
    for part in x.split(lengths):
        padded = torch.nn.functional.pad(part.T, (taps, 0))
        parts.append(torch.nn.functional.conv1d(padded[None], weight[:, None], bias, groups=len(weight))[0].T)
    return torch.cat(parts)


def apply(weights: Attention, trace: AttentionTrace, shaped: Tensor, lengths: list[int]) -> Tensor:
    """Return what the heads give for shaped values (T, B, H·d) of packed prompts: the same shape."""
    parts, first = [], 0
    for length in lengths:
        mixing = FrozenMixing(weights, trace, slice(first, first + length), shaped.dtype)
        parts.append(mixing.forward_shaped(shaped[first : first + length]))
        first += length
    return torch.cat(parts)


def within_taps(alive: Tensor, weights: Attention) -> Tensor:
    """Return which components (N', B) are alive at one of the positions that the convolution reads."""
    taps = 1 if weights.conv is None else weights.conv.weight.shape[-1]
    out = alive.clone()
    for back in range(1, min(taps, len(alive))):
        out[back:] |= alive[:-back]
    return out
