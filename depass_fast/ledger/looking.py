"""The book of attention: what its scores sum to, site by site."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..components.base import Entry
from .pages import Pages
from .reads import Reads

KIND = "attention"  # of a target: the credit of attention in it


def reads_of_looking(reads: Reads, pages: Pages, site: Entry) -> Reads:
    """Return the reads of components that start at a ``site``: their scores sum to all looking behind it."""
    readout = reads.readout
    change, size = pages.changes[site], pages.sizes[site]
    of_places = list(zip(readout.places, reads.rows, strict=True))
    made = replace(
        readout,
        directions=tuple(replace(one, kinds=(KIND,) * len(one.kinds)) for one in readout.directions),
        logits=tuple(change[rows, prompt] for (prompt, _), rows in of_places),
        sizes=tuple(size[rows, prompt] for (prompt, _), rows in of_places),
    )
    return replace(reads, readout=made, constants=torch.zeros_like(reads.constants))


def worst_miss(pages: Pages) -> float:
    """Return the largest |Σ_m score - credit| over all sites, relative to the heads' amounts."""
    each = []
    for site, change in pages.changes.items():
        missed = (pages.totals[site] + pages.constants[site] - change).abs()
        size = pages.sizes[site].clamp_min(torch.finfo(change.dtype).tiny)
        each.append(torch.where(missed == 0, 0.0, missed / size).max())
    return float(torch.stack(each).max())  # NaN, where there is any
