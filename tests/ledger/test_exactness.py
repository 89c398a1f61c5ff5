"""A ledger holds what exact propagation under the same rule gives: every kind of component, family and prompt."""

import pytest
import torch

from depass_fast import Contrast, Custom, DePass, Features, Heads, LogProb, Modules, Neurons, Subspaces, Tokens
from tests.support.components import Dictionary, is_there, kinds
from tests.support.family_models import VARIANTS, available, build_model, build_variant
from tests.support.ledgers import RULES, TOLERANCE, assert_exact
from tests.support.models import FAMILIES, build, random_ids

PROMPT, SHORT = random_ids(9), random_ids(4, seed=1)
TARGETS = [5, LogProb(7), Contrast(3, 9), (3, 9), torch.linspace(-1, 1, 32, dtype=torch.float64)]
NO_DOUBLE = ("xglm", "beam", "hy_v4")  # not run in float64, or only in part


def every_kind(length: int) -> dict:
    """Every kind, for a prompt of ``length`` tokens, with those that are not in the usual list."""
    states = torch.randn(length, 3, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return kinds(length) | {
        "tokens@last": Tokens(-1),
        "modules@last": Modules(-1),
        "attention@last": Modules(-1, which="attention"),
        "subspaces@0": Subspaces(0, [torch.eye(32)[:, :5]]),
        "features, normalised": Features(0, Dictionary(size=10, normalise=True), "resid_post"),
        "features@mid": Features(1, Dictionary(size=10), "resid_mid"),
        "custom@last": Custom(-1, states),
        "custom-post@0": Custom(0, states, site="resid_post"),
        "custom-post@last": Custom(-1, states, site="resid_post"),
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("number", range(len(FAMILIES)))
def test_every_kind_of_component(number, dtype):
    dp, rule = build(list(FAMILIES)[number], dtype), RULES[number % 3]
    trace = dp.trace(PROMPT)
    ledger = dp.ledger(trace, TARGETS, rule=rule)
    for kind in every_kind(len(PROMPT)).values():
        assert_exact(dp, trace, ledger, kind, rule, target=TARGETS)
    assert ledger.completeness_error <= TOLERANCE[dtype]


@pytest.mark.once_a_family
@pytest.mark.parametrize("name", [name for name in VARIANTS if available(name)])
def test_every_variant_of_every_family(name):
    """Two prompts of different lengths: experts are reached by one and not by the other, windows are padded."""
    number = list(VARIANTS).index(name)
    dtype = torch.float32 if VARIANTS[name][0] in NO_DOUBLE else torch.float64
    dp, rule = DePass(build_variant(name).to(dtype)), RULES[number % 2]
    trace = dp.trace([random_ids(6), random_ids(4, seed=2)])
    ledger = dp.ledger(trace, 5, rule=rule)
    every = (Heads(0), Neurons(0), (Tokens(1), Modules(1), Neurons(1))[number % 3])
    for kind in (kind for kind in every if is_there(dp, kind)):
        assert_exact(dp, trace, ledger, kind, rule, target=5)
    assert ledger.completeness_error <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
@pytest.mark.parametrize(
    "lengths", [[1], [2, 2, 2], [1, 70, 3], [3, 9, 9, 1, 2]], ids=lambda lengths: " ".join(map(str, lengths))
)
def test_batches_of_any_lengths(name, lengths, rule="half"):
    """Positions may coincide; the 70 tokens lie in a batch of their own on the way through attention."""
    dp = build(name, torch.float64)
    if max(lengths) > 64:
        dp = DePass(build_long(name))
    prompts = [random_ids(n, seed=n) for n in lengths]
    trace, reads = dp.trace(prompts), {"target": [1, 2], "position": [-1, 0]}
    ledger = dp.ledger(trace, rule=rule, **reads)
    few = max(lengths) > 64  # exact neurons of long prompts take long
    for kind in (Heads(1), Modules(0), Tokens(1) if few else Neurons(1)):
        assert_exact(dp, trace, ledger, kind, rule, **reads)
    for prompt, answer in zip(prompts, ledger.heads(0), strict=True):
        alone = dp.ledger(prompt, rule=rule, **reads).heads(0)
        assert all(torch.allclose(a.scores, b.scores, rtol=0, atol=1e-10) for a, b in zip(answer, alone, strict=True))


def build_long(name: str):
    """A model of a family with room for 70 tokens."""
    model_type, changes = FAMILIES[name]
    return build_model(model_type, **changes, max_position_embeddings=96).double()
