"""Norms that a gate of their own follows, by channel (A.X K2): components and residual stream are scaled in front.

A backend then sees a branch that reads a copy of the state through γ alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch

from ..adapters.weights import Branch
from ..runtime.transfer import to_device
from ..state.state import ComponentState
from ..trace.record import AttentionTrace, MlpTrace

AnyBranch = TypeVar("AnyBranch", bound=Branch)
AnyTrace = TypeVar("AnyTrace", AttentionTrace, MlpTrace)


def behind_gate(
    state: ComponentState, weights: AnyBranch, trace: AnyTrace
) -> tuple[ComponentState, AnyBranch, AnyTrace]:
    """Return a copy of ``state`` behind the scale and the gate of the norm of ``weights``, and both without them."""
    norm = weights.norm
    assert norm is not None and norm.gate is not None
    scale = norm.scale(trace.resid.to(torch.promote_types(trace.resid.dtype, state.rows.dtype)))  # (T, D)
    packed = to_device(state.layout.packed[state.layout.row_segments()], state.device)
    rows = state.rows * scale.to(state.rows)[packed]
    resid: dict[str, Any] = {"resid": trace.resid * scale.to(trace.resid)}
    if isinstance(trace, MlpTrace):
        resid["copied_positions"] = trace.host_positions
    read = ComponentState(rows, state.layout, state.layer, state.site)
    return read, replace(weights, norm=replace(norm, gate=None, is_factor=True)), replace(trace, **resid)
