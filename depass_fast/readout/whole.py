"""The scores of all components, from those of a part of them on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..runtime.ranks import Ranks
from ..runtime.transfer import to_device
from ..state.layout import Layout
from .targets import Directions


def scores_of_all(
    scores: Tensor, layout: Layout, directions: Sequence[Directions], ranks: Ranks
) -> tuple[Layout, Tensor]:
    """Return the layout of all components of a position of every prompt, and their scores on every rank.

    ``scores`` (n,) of this rank's components lie as :func:`depass_fast.readout.targets.read_scores` gives them, and so
    do those of all.
    """
    whole, widths = layout.all, np.array([len(one.vectors) for one in directions])
    begins, places = np.cumsum([0, *(whole.counts * widths)]), []
    for components, count, begin, width in zip(layout.components, layout.counts, begins[:-1], widths, strict=True):
        members = components.members[:count, None]  # those that are alive, the first ones
        places.append((begin + members * width + np.arange(width)).flatten())
    of_all = scores.new_zeros(int(begins[-1]))
    of_all[to_device(np.concatenate(places), scores.device)] = scores
    return whole, ranks.sum(of_all)
