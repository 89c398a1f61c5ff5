"""The bound form of neurons and features: products of numbers and vectors, known once the prompt is traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import Adapter
from ..adapters.spread import Spread
from ..inputs.hook_names import Site
from ..state.state import Factors
from ..trace.record import Trace
from .base import ComponentKind


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Bound(ComponentKind):
    """The neurons or features of one prompt, with a label each.

    ``bias`` (D,), or (N, D), or None is the constant that the same outputs bring to the `bias` component.
    """

    labels: tuple[str, ...]
    bias: Tensor | None
    site: Site

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        return self.labels

    def constant(self, adapter: Adapter, trace: Trace, prompt: int, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class BoundProducts(Bound):
    """The neurons or features of one prompt: the named components are ``products``."""

    products: Factors

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        assert self.products.coefficients is not None
        numbers, vectors = self.products.coefficients.to(out.dtype), self.products.vectors.to(out.dtype)
        torch.mul(numbers[..., None], vectors, out=out)

    def factors(self, adapter: Adapter, trace: Trace, prompt: int) -> Factors:
        return self.products


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class BoundSpread(Bound):
    """The neurons of one prompt where there are several streams: each writes a multiple of its vector to every one.

    ``parts`` are activations (N, I), vectors (I, D) and the weights (N, n) of the streams, of each of the layer's MLPs.
    Weights may also be factors (N, 1, D) of one stream by channel. ``bias`` is (N, n·D), or None.
    """

    parts: Sequence[tuple[Tensor, Tensor, Tensor]]

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        first = 0
        for part in self.parts:
            numbers, vectors, weights = (x.to(out) for x in part)
            here = out[:, first : first + len(vectors)].unflatten(-1, (weights.shape[1], -1))
            if weights.ndim == 3:
                torch.mul(vectors[:, None], weights[:, None], out=here).mul_(numbers[..., None, None])
            else:
                torch.mul((numbers[:, :, None] * weights[:, None])[..., None], vectors[:, None], out=here)
            first += len(vectors)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class BoundAlong(Bound):
    """The neurons of one prompt whose output reaches later positions: ``products`` behind a convolution."""

    products: Factors
    spread: Spread

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        assert self.products.coefficients is not None
        numbers, vectors = self.products.coefficients.to(out), self.products.vectors.to(out)
        out.zero_()
        for back, taps in enumerate(self.spread.taps.to(out)[: len(out)]):
            out[back:].addcmul_(numbers[: len(out) - back, :, None], vectors * taps)
