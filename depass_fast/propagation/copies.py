"""Copies of a state."""

from __future__ import annotations

import torch

from ..runtime.memory import empty_on_host
from ..state.state import ComponentState


def copy_state(state: ComponentState) -> ComponentState:
    """Return a copy of a state, pinned in host memory where that is."""
    rows = state.rows
    pinned = rows.device.type == "cpu" and rows.is_pinned()
    copy = empty_on_host(rows.shape, rows.dtype, pinned) if pinned else torch.empty_like(rows)
    return ComponentState(copy.copy_(rows), state.layout, state.layer, state.site)
