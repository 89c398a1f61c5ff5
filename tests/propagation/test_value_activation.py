"""The activation behind a recurrence's values: frozen at its ratio, or shared out by the allocation."""

import pytest
import torch

from depass_fast import DePass, Heads, Tokens
from tests.support.family_models import available, build_variant
from tests.support.models import build, random_ids

NAMES = ("qwen3_next", "mamba2: biases", "mamba: biases", "kimi_linear", "zamba2", "qwen4_exp_text")
PROMPTS = [torch.tensor(random_ids(5)), torch.tensor(random_ids(3))]
RULES = ("softmax", "linear", "relu", "max", "taylor", "half", "shapley")
BACKENDS = (
    ("reference", {}),
    ("torch", {"memory_budget": 20_000}),
    ("torch", {"stream": True, "memory_budget": 20_000}),
)

pytestmark = pytest.mark.skipif(not available(NAMES[0]), reason="transformers without recurrent layers")


@pytest.fixture(scope="module", params=NAMES)
def engine(request) -> DePass:
    return DePass(build_variant(request.param).double(), progress=False, value_activation="shared")


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_complete_and_all_backends_agree(engine, rule):
    kind, given = Heads(1) if rule in ("softmax", "relu") else Tokens(), {"allocation": rule, "method": "exact"}
    trace = engine.trace(PROMPTS)
    frozen = engine.attribute(trace, kind, 5, value_activation="frozen", backend="torch", **given)
    oracle = None
    for backend, options in BACKENDS:
        found = engine.attribute(trace, kind, 5, backend=backend, **given, **options)
        oracle = oracle or found
        for one, other, before in zip(found, oracle, frozen, strict=True):
            assert float(one.layer_errors.max().clamp_min(one.completeness_error)) <= 1e-12
            assert one.labels == other.labels
            assert (one.scores - other.scores).abs().max() <= 1e-12 * other.scores.abs().max()
            moved = float((one.scores - before.scores).abs().max() / before.scores.abs().max())
            assert moved <= 1e-12 if rule in ("taylor", "half", "shapley") else moved > 1e-3
            assert one.value_activation == (None if rule in ("taylor", "half", "shapley") else "shared")
            assert before.value_activation is None


def test_float32_and_what_is_watched():
    dp = DePass(build_variant("qwen3_next"), progress=False, value_activation="shared")
    result = dp.attribute(PROMPTS[0], Tokens(), 5, backend="torch", verify=True)
    assert result.completeness_error <= 1e-5 and result.verification.compared > 0
    assert result.verification.error <= 1e-5 and not result.warnings
    assert "activations of values shared" in str(result)


def test_several_layers_and_a_few_components_in_focus():
    dp = DePass(build_variant("qwen3_next").double(), progress=False, value_activation="shared")
    trace = dp.trace(PROMPTS[0])
    layers = dp.attribute(trace, Heads(layers="all"), 5, method="exact")
    for index, layer in enumerate(layers.by_layer):
        alone = dp.attribute(trace, Heads(index), 5, backend="reference")
        assert torch.allclose(layer.scores, alone.scores, atol=1e-12)
    whole = dp.attribute(trace, Tokens(), 5)
    focus, state = dp.focus(trace, Tokens(), [1, 3]), dp.start(trace, Tokens())
    assert focus.labels == [whole.labels[1], whole.labels[3]]
    for states, layer in list(zip(focus.states, focus.layers, strict=True))[1:]:
        state = dp.carry(trace, state, layer, backend="reference")
        places = [state.labels.index(label) for label in focus.labels]
        assert torch.allclose(states.squeeze(), state.dense()[:, places], atol=1e-12)


def test_a_ledger_is_that_of_the_frozen_ratio():
    engine = DePass(build_variant("qwen3_next").double(), progress=False)
    shared = engine.ledger(PROMPTS[0], 5, rule="shapley", value_activation="shared").scores(Tokens())
    exact = engine.attribute(PROMPTS[0], Tokens(), 5, allocation="shapley", value_activation="shared", method="exact")
    assert torch.allclose(shared.scores, exact.scores, atol=1e-12)


def test_the_plan_knows_what_is_shared():
    engine = DePass(build_variant("qwen3_next"), progress=False)
    frozen, shared = (
        engine.plan(random_ids(40), Tokens(), value_activation=how, measure=False).of("torch")
        for how in ("frozen", "shared")
    )
    assert shared.peak_bytes - frozen.peak_bytes == 40 * 5 * 32 * 4  # two recurrent layers, one at a time


def test_what_has_no_meaning_is_refused():
    engine = DePass(build_variant("qwen3_next"), progress=False)
    with pytest.raises(ValueError, match="value_activation: expected 'frozen' or 'shared', got 'silu'"):
        engine.attribute(PROMPTS[0], Tokens(), value_activation="silu")
    with pytest.raises(ValueError, match="value_activation: no layer of this model"):
        build("llama-gqa").attribute(PROMPTS[0], Tokens(), value_activation="shared")

    def even(gates, temperature):
        alive = gates.alive[..., None].to(gates.values)
        return (alive / alive.sum(1, keepdim=True)).expand_as(gates.values)

    with pytest.raises(ValueError, match="value_activation: even sees all components at once"):
        engine.attribute(PROMPTS[0], Tokens(), allocation=even, value_activation="shared", backend="torch")
    own = engine.attribute(PROMPTS[0], Tokens(), allocation=even, value_activation="shared", backend="reference")
    assert own.completeness_error <= 1e-5
