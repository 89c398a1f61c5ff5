"""The adjoint sweep on a trained model, whose gates are heavy-tailed: few components drive a neuron alone."""

import warnings
from functools import partial

import pytest

from depass_fast import DePass, Neurons
from depass_fast.adjoint.approximation import Approximation
from depass_fast.options import Adjoint
from tests.support.trained import smollm2

PROMPT = "Once upon a time there was a little girl named"
# dp.attribute(PROMPT, Neurons(0), method="exact")
EXACT = {"L0N585": 1.004, "L0N1222": 0.796, "L0N196": 0.141}


@pytest.fixture(scope="module")
def trained():
    return DePass(*smollm2(), progress=False)


def test_the_loudest_components_are_right(trained):
    """By the root mean square of their gates these were not loud: 0.200, -0.186 and 0.481."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = trained.attribute(PROMPT, Neurons(layers=[0, 2, 11]), method=Adjoint(refine=0))
    for label, score in EXACT.items():
        assert found[0].score(label) == pytest.approx(score, abs=0.03)
    assert max(found.estimate.layer_errors.values()) < 0.03 and found.warnings == []


def test_a_layer_that_is_off_is_named(trained, monkeypatch):
    """With hardly any component carried the first layer is wrong by 95 %: the sample finds it and says what to do."""
    monkeypatch.setattr("depass_fast.methods.adjoint.Approximation", partial(Approximation, loud=1e9))
    with pytest.warns(UserWarning, match=r"the scores of layer 0 by \d+% are off; refine more of every layer"):
        trained.attribute(PROMPT, Neurons(0), method=Adjoint(refine=0))
