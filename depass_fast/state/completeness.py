"""The completeness errors of states on their way, whose last steps are taken for all layers at once.

A state's sums are taken where it is; what is left are a few numbers per position, for which a GPU would wait for the
host in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..runtime.transfer import all_to_device
from .layout import Layout
from .state import ComponentState


class Completeness:
    """Collects ‖Σ_m X[n, m] - x[n]‖ of states, and ‖x[n]‖, until :meth:`errors` divides and compares them.

    ``missed`` measures a state beside a residual stream, as :meth:`ComponentState.missed` does.
    """

    def __init__(
        self, missed: Callable[[ComponentState, Tensor], tuple[Tensor, Tensor]] = ComponentState.missed
    ) -> None:
        self._measured = missed
        self._layouts: list[Layout] = []
        self._missed: list[Tensor] = []  # (S,) of each state, or (S, B)
        self._sizes: list[Tensor] = []  # (T,) of the hidden states beside it, or (T, B)

    def measure(self, state: ComponentState, resid: Tensor) -> None:
        """Measure a state beside the residual stream ``resid`` (T, D) at its place."""
        missed, sizes = self._measured(state, resid)
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
        missed, sizes = _norms(self._missed, device), _norms(self._sizes, device)
        error = missed / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)[at]
        worst = error.new_zeros(group).scatter_reduce_(0, of, error, "amax")
        return list(worst.split([len(layout.components) for layout in self._layouts]))


def _norms(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Join the norms of several states: of each (n,), or (n, B), norms of blocks of columns."""
    parts = [part.to(device) for part in parts]
    if len({part.shape[1:] for part in parts}) > 1:
        parts = [part if part.ndim == 1 else torch.linalg.vector_norm(part, dim=1) for part in parts]
    whole = torch.cat(parts)
    return whole if whole.ndim == 1 else torch.linalg.vector_norm(whole, dim=1)
