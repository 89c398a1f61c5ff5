"""An engine's model run again with the attention of a trace: its probabilities are held, everything else reacts."""

from __future__ import annotations

from contextlib import AbstractContextManager

from ..engine import DePass
from ..trace.held import check_holdable, held_attention
from ..trace.record import Trace


def frozen_attention(engine: DePass, trace: Trace) -> AbstractContextManager[None]:
    """Hold the attention probabilities of an engine's model, as :func:`depass_fast.trace.held.held_attention` does."""
    return held_attention(engine.adapter, trace)


def check_freezable(engine: DePass) -> None:
    """Raise ValueError where the attention of an engine's model cannot be replaced."""
    check_holdable(engine.adapter)
