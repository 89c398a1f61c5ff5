"""States and their rows: the difference to the hidden state, and the rows of a position."""

import numpy as np
import pytest
import torch

from depass_fast import Heads, Modules, Tokens
from depass_fast.state.completeness import Completeness
from depass_fast.state.layout import Layout
from depass_fast.state.state import ComponentState
from tests.support.models import build, random_ids


def missed(state, resid):
    """The completeness errors, a segment at a time."""
    layout, worst = state.layout, [0.0] * len(state.layout.components)
    for segment, (prompt, packed) in enumerate(zip(layout.prompt, layout.packed, strict=True)):
        rows = state.rows[layout.starts[segment] : layout.starts[segment + 1]]
        error = (rows.sum(0) - resid[packed]).norm() / resid[packed].norm()
        worst[prompt] = max(worst[prompt], float(error))
    return torch.tensor(worst)


def by_kernel(state, resid):
    """The distances and sizes as the triton backend finds them, by blocks of columns."""
    pytest.importorskip("triton")
    from depass_fast.backends.triton.backend import TritonBackend

    found = TritonBackend().missed(state, resid)
    assert [part.ndim for part in found] == [2, 2]
    return found


def completeness(way, *measured):
    """The errors of states beside their residual streams, measured together."""
    found = Completeness(way)
    for state, resid in measured:
        found.measure(state, resid)
    return found.errors()


STATES = {"tokens": [Tokens(1)], "heads": [Heads(1)], "joint": [Heads(1), Modules(1, which="attention"), Heads(1)]}


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(6,), (5, 3), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("kinds", STATES.values(), ids=STATES)
@pytest.mark.parametrize("way", [ComponentState.missed, by_kernel])
def test_completeness_is_what_a_plain_loop_finds(way, kinds, lengths):
    dp, generator = build("llama-gqa"), torch.Generator().manual_seed(0)
    trace = dp.trace([random_ids(n, seed=seed) for seed, n in enumerate(lengths)])
    states = [dp.start(trace, kind) for kind in kinds]
    for state in states:  # no position's error is another's
        state.rows += torch.randn(state.rows.shape, generator=generator)
    state = ComponentState.join(states)
    resid = trace.resid_at(state.layer, state.site)
    expected = missed(state, resid)
    assert len(expected.unique()) == len(expected) == len(kinds) * len(lengths)
    (error,) = completeness(way, (state, resid))
    assert torch.allclose(error, expected, rtol=1e-5)

    for positions in ([2], [0, 2]):  # of every prompt
        reads = [np.array(positions)] * len(lengths)
        parts = [one.at(Layout.of(one.layout.components, trace.offsets, reads)) for one in states]
        fewer = ComponentState.join(parts)
        both = completeness(way, (state, resid), (fewer, resid))
        for error, plain in zip(both, (expected, missed(fewer, resid)), strict=True):
            assert torch.allclose(error, plain, rtol=1e-5)


def test_the_kernel_s_norms_and_others_are_measured_together():
    """A state in float64, and one with many rows at a position, has no kernel: its norms are in one piece."""
    pytest.importorskip("triton")
    from depass_fast.backends.triton.completeness import missed as without_others

    dp = build("llama-gqa")
    trace = dp.trace(random_ids(5))
    state, other = dp.start(trace, Tokens(1)), dp.start(trace, Heads(1))
    other.rows = other.rows.double() + 1.0
    assert without_others(other, trace.resid(2)) is None
    ways = iter([by_kernel, ComponentState.missed])
    found = completeness(lambda *given: next(ways)(*given), (state, trace.resid(1)), (other, trace.resid(2)))
    alone = [
        completeness(ComponentState.missed, pair)[0] for pair in ((state, trace.resid(1)), (other, trace.resid(2)))
    ]
    for error, expected in zip(found, alone, strict=True):
        assert torch.allclose(error.double(), expected.double(), rtol=1e-4, atol=1e-6)


def test_rows_are_found_where_they_are_and_nowhere_else():
    dp = build("llama-gqa")
    trace = dp.trace([random_ids(5, seed=1), random_ids(3, seed=2)])
    layout = dp.start(trace, Tokens()).layout

    def some(*positions):
        return Layout.of(layout.components, trace.offsets, [np.array(p, np.int64) for p in positions])

    assert layout.find(some([4, 1], [2])).tolist() == [4, 1, 7]
    held = some([1, 4], [0])
    assert held.find(some([4], [0])).tolist() == [1, 2]
    for absent in (some([2], []), some([0], [0]), some([4], [1]), some([], [2])):
        with pytest.raises(KeyError, match="positions that the layout does not have"):
            held.find(absent)

    joint = Layout.join([dp.start(dp.trace(random_ids(3)), Heads(0)).layout] * 2)
    held, absent = joint.only(np.array([0, 1])), joint.only(np.array([2]))
    with pytest.raises(KeyError, match="positions that the layout does not have"):
        held.find(absent)  # position 1 of the first decomposition is not position 0 of the second
