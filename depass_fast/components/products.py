"""Components of one prompt that are numbers times vectors: neurons and features, once the trace is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import Adapter
from ..inputs.hook_names import Site
from ..state.state import Factors
from ..trace.record import Trace
from .base import ComponentKind


@dataclass(frozen=True, eq=False, kw_only=True)
class BoundProducts(ComponentKind):
    """Components of one prompt that are numbers times vectors, with what else they bring to ``bias``."""

    labels: tuple[str, ...]
    products: Factors
    bias: Tensor | None
    site: Site

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        return self.labels

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        """Write products of numbers and vectors into all of ``out`` (N, M, D)."""
        numbers, vectors = self.products.coefficients.to(out.dtype), self.products.vectors.to(out.dtype)
        torch.mul(numbers[..., None], vectors, out=out)

    def factors(self, adapter: Adapter, trace: Trace, prompt: int) -> Factors:
        return self.products

    def constant(self, adapter: Adapter, trace: Trace, prompt: int, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)
