"""Estimates of several steps: every figure is that of the worst of them."""

from depass_fast import Estimate
from depass_fast.results.estimate import worst_of

QUIET = Estimate(8, 0.999, 0.01, 0.02, 4, 0.1, (0.05, 0.6), 0.3, {0: 0.001, 2: 0.02})


def test_no_step_hides_another():
    steps = [
        QUIET,
        Estimate(9, 0.99, 0.5, 0.01, 4, None, None, None, {0: 0.2, 1: 0.01}),
        Estimate(7, 0.7, 0.02, None, 5, 0.0, (0.0, 0.9), 0.1, None),
        Estimate(8, None, None, 0.4, 4, 0.3, (0.01, 0.5), 0.2, {}),
    ]
    worst = Estimate(9, 0.7, 0.5, 0.4, 5, 0.3, (0.05, 0.9), 0.3, {0: 0.2, 1: 0.01, 2: 0.02})
    assert worst_of(steps) == worst_of(reversed(steps)) == worst_of([None, *steps]) == worst
    assert "worst layer 0 20.0%" in str(worst_of(steps))


def test_one_step_is_itself_and_none_is_none():
    assert worst_of([None, QUIET]) == QUIET
    assert worst_of([]) is worst_of([None]) is None
    bare = Estimate(0, None, None, None, 0, None, None, None)
    assert worst_of([bare, bare]) == bare
