"""The approximations of a sweep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-26  # the softmax is a maximum long before; g/T and its sums stay in float32's range


@dataclass(frozen=True)
class Approximation:
    """The approximations of a sweep under the softmax rule at a ``temperature``.

    ``loud``: components whose largest |g/T| at any MLP ahead (:mod:`depass_fast.adjoint.loud`) is at least this are
    carried explicitly, the ``at_most`` loudest of every start layer. ``scatter``: the crowd's spread is estimated.
    ``releases``: explicit components go back to the crowd behind the last MLP where they are loud, when the root mean
    square of their g/T can be expected to be below ``quiet``.
    """

    temperature: float
    loud: float = 2.5
    quiet: float = 0.1
    at_most: int = 128
    scatter: bool = True
    releases: bool = True
    seed: int = 0

    def signs(self, count: int, place: int) -> Tensor:
        """Return random signs (count,) in host memory, int64; those of a ``place`` (a layer) are always the same."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
        return torch.randint(0, 2, (count,), generator=generator, device="cpu") * 2 - 1
