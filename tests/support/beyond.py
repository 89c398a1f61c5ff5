"""Calls that are for layers of softmax attention and an MLP, asked of a model that has more."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from depass_fast import DePass, Neurons
from depass_fast.compat import decomposed_state_manager


def check_refused_by_name(dp: DePass, ids: Sequence[int], beyond: str) -> None:
    """Graphs, attention's book, the softmax adjoint and the published interface name ``beyond``; reports note it."""
    (sheet,) = dp.report(ids, 5).sheets  # of what a ledger knows
    assert any("reports do not know that" in note for note in sheet.notes)
    for ask in (
        lambda: dp.graph(ids, 5),
        lambda: dp.ledger(ids, 5, attention=True),
        lambda: dp.attribute(ids, Neurons(0), 5, method="adjoint", allocation="softmax"),
        lambda: dp.explain_attention(ids, 1, 0),
        lambda: decomposed_state_manager(dp.model, None),
    ):
        with pytest.raises(ValueError, match=beyond):
            ask()
