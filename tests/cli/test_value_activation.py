"""``--value-activation``: the activations of a recurrence's values, frozen or shared out."""

from __future__ import annotations

import json

import pytest

from depass_fast import DePass, Tokens
from tests.support.command import fail, one_thread, run  # noqa: F401 (a fixture)
from tests.support.family_models import build_variant

IDS = [5, 11, 3, 8]
FLAGS = ("--components", "tokens", "--device", "cpu")


@pytest.fixture(scope="module")
def mamba() -> DePass:
    return DePass(build_variant("mamba2"), progress=False)


@pytest.mark.parametrize("given", ["frozen", "shared"])
def test_it_reaches_the_engine(capsys, mamba, tmp_path, given):
    mamba.model.save_pretrained(tmp_path)
    flags = ("--model", str(tmp_path), *FLAGS, "--value-activation", given)
    found = json.loads(run(capsys, "attribute", *flags, "--quiet", "--input-ids", "5 11 3 8", "--json"))
    wanted = mamba.attribute(IDS, Tokens(), value_activation=given)
    assert found["scores"] == pytest.approx(wanted.scores.tolist(), abs=1e-5)
    planned = mamba.plan(4, Tokens(), value_activation=given, measure=False)
    assert json.loads(run(capsys, "plan", *flags, "--length", "4", "--json"))["flop"] == planned.to_dict()["flop"]


@pytest.mark.parametrize("command", [("attribute", "--prompt", "Nyria"), ("plan", "--length", "4")])
def test_models_without_are_refused(capsys, command):
    error = fail(capsys, *command, "--model", "demo", *FLAGS, "--value-activation", "shared")
    assert "value" in error and "activation: no layer of this model has an activation behind its values" in error
