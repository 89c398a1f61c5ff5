"""The readout computes the read positions only, and gives the same numbers as the full state."""

import pytest
import torch

from depass_fast import Heads, Neurons, Tokens
from tests.support.models import random_ids
from tests.support.states import close
from tests.support.steps import carried


@pytest.mark.parametrize("position", [-1, 0, 4])
def test_the_pruned_readout_equals_the_full_state(family, position):
    """attribute computes the last layer at one position only; decompose computes all of it."""
    ids = random_ids(8, seed=2)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    for kind in (Tokens(), Heads(-1), Neurons(-1), Neurons(0)):
        result = family.attribute(ids, kind, direction, position=position)
        full = family.decompose(ids, kind).dense()[position] @ direction
        assert torch.allclose(result.scores, full, atol=2e-5 * float(full.abs().max().clamp_min(1)))


@pytest.mark.parametrize("count", [1, 3, 12])
def test_any_number_of_positions_can_be_read(family, count):
    """Few are computed one by one, many with all others."""
    ids = random_ids(13, seed=4)
    trace = family.trace([ids, ids[:6]])
    reads = [list(range(13 - count, 13)), [0, 5]]
    for kind in (Tokens(), Heads(1), Neurons(0)):
        run = family.options.build(family.adapter)
        state, errors = carried(family, trace, family.start(trace, kind), 3, run, reads)
        whole = family.decompose(trace, kind, end=3)
        for p, at in enumerate(reads):
            assert close(state.dense(p), whole.dense(p)[at]) and errors[-1][p] < 1e-5
