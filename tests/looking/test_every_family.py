"""Attention's own book in every family: sides, pairs and log-probabilities are complete, both ways to credit agree."""

import math

import pytest
import torch

from depass_fast import AttentionCredit, AttentionExplanation, DePass, Heads, Modules, Neurons, Tokens
from tests.support.ahead_models import AHEAD
from tests.support.family_models import FIRST, VARIANTS, available, build_variant
from tests.support.gemma_models import GEMMAS
from tests.support.models import random_ids, runs
from tests.support.recurrent_models import RECURRENT

# their code computes the rotary embedding, or norms of queries and keys, in float32 whatever the model's dtype
NARROW = ("llama4", "llama4_text", "cohere", "cohere2", "cohere2_moe", "deepseek_v2", "ernie4_5", "ernie4_5_moe")
NARROW += ("modernbert-decoder",)
PROMPTS = [random_ids(9), random_ids(5, seed=2)]


def tolerance(model_type: str, dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-6 if model_type in NARROW else 1e-12


def check(why: AttentionExplanation, allowed: float) -> None:
    """Assert that everything in an explanation of all heads sums to what it should."""
    assert why.completeness_error <= allowed
    size = why.query_side.abs().sum(-1) + why.key_side.abs().sum(-1) + 1
    assert ((why.query_side.sum(-1) - why.scores).abs() <= allowed * size).all()
    assert ((why.key_side.sum(-1) - why.scores).abs() <= allowed * size).all()
    seen = 1 if why.sink is None else 1 - why.sink
    assert torch.allclose(why.probabilities.sum(-1), torch.as_tensor(seen, dtype=why.scores.dtype), atol=1e-6)
    largest = float(size.max())
    for head in (why.heads[0], why.heads[-1]):
        number, key = why.heads.index(head), why.keys[0]
        wanted = float(why.probabilities[number, 0].log() + why.entropy[number])
        assert math.isclose(float(why.log_probability(key, head).sum()), wanted, abs_tol=4 * allowed * largest)
        apart = float((why.probabilities[number, 0] / why.probabilities[number, -1]).log())
        difference = float(why.difference(key, why.keys[-1], head).sum())
        assert math.isclose(difference, apart, abs_tol=4 * allowed * largest)
        pairs = why.pairs(key, k=len(why.labels) ** 2, head=head)
        total, amount = sum(pair.score for pair in pairs), sum(abs(pair.score) for pair in pairs)
        assert math.isclose(total, float(why.scores[number, 0]), abs_tol=4 * allowed * (amount + 1))


def same_totals(credit: AttentionCredit, steered: object, allowed: float) -> None:
    """Assert that a ledger's second book has the same scores as the credit, summed over heads."""
    total = dict(zip(credit.labels, credit.total().tolist(), strict=True))
    total["bias"] = total.get("bias", 0.0) + total.pop("position", 0.0)  # a ledger has one label for both
    found = dict(zip(steered.labels, steered.scores.tolist(), strict=True))
    amount = sum(map(abs, total.values()))
    for label in total.keys() | found.keys():
        assert math.isclose(total.get(label, 0.0), found.get(label, 0.0), abs_tol=allowed * amount)


@pytest.mark.once_a_family
@pytest.mark.parametrize("name", [name for name in VARIANTS if available(name)])
def test_every_variant(name):
    model_type, number = VARIANTS[name][0], list(VARIANTS).index(name)
    model = build_variant(name)
    if name in {*RECURRENT, *GEMMAS, *AHEAD}:
        with pytest.raises(ValueError, match="attention's own book"):
            DePass(model).explain_attention(PROMPTS[0], Tokens(), 0)
        with pytest.raises(ValueError, match="attention's own book"):
            DePass(model).ledger(PROMPTS[0], 5, attention=True)
        return
    model = model if runs(model.double()) else model.float()
    dp, allowed = DePass(model), tolerance(model_type, model.dtype)
    trace = dp.trace(PROMPTS)
    kind = (Heads(0), Neurons(0), Tokens(1), Modules(0))[number % 4]
    for components, layer in ((Tokens(), 0), (kind, dp.adapter.n_layers - 1)):
        for why in dp.explain_attention(trace, components, layer):
            check(why, allowed)
    if name not in FIRST:
        return
    ledger = dp.ledger(trace, 5, attention=True)
    assert ledger.steered.completeness_error <= allowed
    credits = dp.attention_credit(trace, kind, 5)
    for credit, steered in zip(credits, ledger.steered.scores(kind), strict=True):
        assert credit.completeness_error <= allowed
        same_totals(credit, steered, max(allowed, 1e-11))
