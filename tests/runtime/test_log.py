"""Warnings name the user's own line."""

from __future__ import annotations

import warnings

import pytest

from depass_fast import Adjoint, ApproximationWarning, CompletenessWarning, DePass, Neurons, Tokens, VerificationWarning
from depass_fast.backends import TorchBackend
from tests.support.family_models import build_model
from tests.support.models import build, random_ids


def lines(call) -> set[tuple[str, type]]:
    """The files that a call's warnings name, and their kinds."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
    return {(warning.filename, warning.category) for warning in said}


@pytest.mark.parametrize("call", ["attribute", "decompose", "layers"])
def test_a_failed_verification(call, monkeypatch):
    right = TorchBackend.allocate_mlp

    def wrong(*arguments):
        out = right(*arguments)
        out.rows.mul_(1.01)
        return out

    monkeypatch.setattr(TorchBackend, "allocate_mlp", wrong)
    dp, ids = build("llama-gqa"), random_ids(5)
    calls = {
        "attribute": lambda: dp.attribute(ids, Tokens(), verify=True),
        "decompose": lambda: dp.decompose(ids, Tokens(), verify=True),
        "layers": lambda: dp.attribute(ids, Neurons(layers="all"), method="exact", verify=True),
    }
    assert lines(calls[call]) == {(__file__, VerificationWarning), (__file__, CompletenessWarning)}


def test_an_approximation_that_is_not_to_be_relied_upon():
    dp = DePass(build_model("llama", intermediate_size=1500, initializer_range=1.0))
    found = lines(lambda: dp.attribute(random_ids(6), Neurons(0), 5, method=Adjoint(), temperature=1e-3))
    assert found == {(__file__, ApproximationWarning)}


def test_memory_that_runs_out(monkeypatch):
    dp, failures = build("llama-gqa"), [RuntimeError("not enough memory: you tried to allocate")]
    inner = TorchBackend._blocks

    def short(*given, **named):
        if failures:
            raise failures.pop()
        return inner(*given, **named)

    monkeypatch.setattr(TorchBackend, "_blocks", short)
    assert lines(lambda: dp.attribute(random_ids(6), Tokens())) == {(__file__, RuntimeWarning)}
