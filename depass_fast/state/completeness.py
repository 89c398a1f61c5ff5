"""The completeness errors of states on their way, whose last steps are taken for all layers at once.

A state's sums are taken where it is; what is left are a few numbers per position, for which a GPU would wait for the
host in every layer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..runtime.transfer import all_to_device
from .layout import Layout
from .state import ComponentState


class Completeness:
    """Collects ‖Σ_m X[n, m] - x[n]‖ of states, and ‖x[n]‖, until :meth:`errors` divides and compares them.

    ``summed`` makes of the sum of a state's components that of all, where states hold a part of them.
    """

    def __init__(self, summed: Callable[[Tensor], Tensor] | None = None) -> None:
        self._summed = summed
        self._layouts: list[Layout] = []
        self._missed: list[Tensor] = []  # (S,) of each state
        self._sizes: list[Tensor] = []  # (T,) of the hidden states beside it

    def measure(self, state: ComponentState, resid: Tensor) -> None:
        """Measure a state beside the residual stream ``resid`` (T, D) at its place."""
        missed, sizes = state.missed(resid, self._summed)
        self._layouts.append(state.layout)
        self._missed.append(missed)
        self._sizes.append(sizes)

    def errors(self) -> list[Tensor]:
        """Return the largest error of every prompt's positions, (P,) for each state, on the last one's device."""
        device, segments, groups, first, group = self._missed[-1].device, [], [], 0, 0
        for layout, sizes in zip(self._layouts, self._sizes, strict=True):
            segments.append(first + layout.packed)
            groups.append(group + layout.prompt)
            first, group = first + len(sizes), group + len(layout.components)
        at, of = all_to_device([np.concatenate(segments), np.concatenate(groups)], device)
        missed, sizes = (torch.cat([x.to(device) for x in each]) for each in (self._missed, self._sizes))
        error = missed / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)[at]
        worst = error.new_zeros(group).scatter_reduce_(0, of, error, "amax")
        return list(worst.split([len(layout.components) for layout in self._layouts]))
