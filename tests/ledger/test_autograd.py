"""A ledger is gradient × component of a linearised model, by autograd, through the model of transformers itself."""

import pytest
import torch
import transformers

from depass_fast import Contrast, DePass, LogProb
from tests.support.family_models import VARIANTS, available, build_variant
from tests.support.ledgers import off, scores_by_label
from tests.support.linearised import Linearised
from tests.support.models import random_ids

IDS, INNER = random_ids(8), 4
# Relative to Σ|scores|. In a float64 model transformers runs RMSNorms, softmax and experts' routers in float32; the
# library computes scales and P from what went in, with the rounding that transformers adds or without. LayerNorm and
# softmax of GPT-2 run in float64: there the two agree to 2e-14.
WITHIN = 1e-6
IN_FLOAT64, WITHIN_FLOAT64 = ("gpt2",), 1e-12
TARGETS = {
    5: lambda logits: logits[5],
    LogProb(7): lambda logits: logits[7] - logits.detach().softmax(-1) @ logits,
    Contrast(3, 9): lambda logits: logits[3] - logits[9],
}
EXPERTS = ("mixtral", "qwen2_moe", "gpt_oss")  # whose weights the support knows as transformers 5 stores them

FAMILIES = [
    "llama: MHA",
    "llama: GQA",
    "llama: biases",
    "qwen2: window",
    "qwen3: MQA, biases",  # norms of queries and keys
    "gemma2: tight caps",  # norms of outputs, caps of attention and of logits, tanh-GELU
    "gpt2",  # LayerNorm, ungated
    "gpt_neox: parallel",
    "gpt_neox: sequential",
    "mixtral",  # experts and a router
    "qwen2_moe",  # and a shared one with a gate, and a layer without
    "gpt_oss",  # clamps, sinks
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rule", ["half", "shapley"])
def test_a_ledger_is_gradient_times_component_of_a_linearised_model(name, rule):
    if not available(name) or (VARIANTS[name][0] in EXPERTS and int(transformers.__version__.split(".")[0]) < 5):
        pytest.skip("the installed transformers does not have it, or stores its experts in another way")
    model = build_variant(name, implementation="eager").double()
    linearised, within = Linearised(model, IDS, rule), WITHIN_FLOAT64 if name in IN_FLOAT64 else WITHIN
    ledger = DePass(model).ledger(IDS, list(TARGETS), rule=rule, position=[-1, INNER])
    for read, position in enumerate([-1, INNER]):
        for target, function in enumerate(TARGETS.values()):
            value, expected = linearised.scores(function, position)
            assert {kind for kind, _ in expected} == {"tokens", "heads", "neurons"} and len(expected) == 9
            for (kind, layer), scores in expected.items():
                found = scores_by_label(getattr(ledger, kind)(layer)[read], target)
                assert off(found, scores, float(value)) <= within, (kind, layer, position, target)


def test_the_linearised_models_are_not_changed(name="gemma2: tight caps"):
    """Their logits are the model's, and it computes as before when they are done."""
    model = build_variant(name, implementation="eager").double()
    before = model(torch.tensor([IDS])).logits[0]
    assert torch.allclose(Linearised(model, IDS, "shapley").logits, before, rtol=0, atol=1e-6)
    assert torch.equal(model(torch.tensor([IDS])).logits[0], before)
