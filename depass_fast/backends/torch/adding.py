"""Additions to some rows of a state: constants for `bias`, and components that have just started."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ...labels import BIAS
from ...runtime.transfer import to_device
from ...state.state import ComponentState


def add_to_bias(state: ComponentState, constant: Tensor | None) -> None:
    """Add ``constant`` (D,) or (S, D) to the rows of `bias`, if both are there."""
    bias, counts = state.layout.index(BIAS), state.layout.counts
    if bias is None or constant is None or not len(counts):
        return
    if (counts == counts[0]).all():
        state.rows.view(len(counts), -1, state.rows.shape[1])[:, bias].add_(constant.to(state.device))
        return
    rows = state.layout.tensor("starts", state.device)[:-1] + bias
    state.rows.index_add_(0, rows, constant.to(state.rows).expand(len(rows), -1))


def add_everywhere(state: ComponentState, prompt: int, part: slice, new: Tensor) -> None:
    """Add ``new`` (B, N, D) to the named components ``part``, which are alive at all positions of the prompt."""
    rows, extras = state.rows[state.layout.rows(prompt)], len(state.layout.components[prompt].extras)
    block = rows.view(new.shape[1], -1, rows.shape[1])
    block[:, extras + part.start : extras + part.stop].add_(new.transpose(0, 1))


def add_later(state: ComponentState, prompt: int, part: slice, new: Tensor) -> None:
    """Add ``new`` (B, N - part.start, D) to the tokens ``part``, each from its own position on."""
    layout, extras = state.layout, len(state.layout.components[prompt].extras)
    starts = layout.starts[layout.segments(prompt)]
    token = np.arange(part.start, part.stop)[:, None]
    alive = token <= np.arange(part.start, len(starts))
    rows = (starts[part.start :] + extras + token)[alive]
    slots = to_device(np.flatnonzero(alive), state.device)
    new = new.flatten(0, 1).index_select(0, slots).to(state.rows.dtype)
    state.rows.index_add_(0, to_device(rows, state.device), new)
