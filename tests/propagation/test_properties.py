"""Properties over random inputs: what must hold whatever the prompt, the components and the options."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from depass_fast import Custom, Heads, Neurons, Tokens
from depass_fast.allocation import RULES
from tests.support.models import build

FAST = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

models = st.sampled_from(["llama-gqa", "mistral-window", "qwen2", "qwen3-biases"])
prompts = st.lists(st.integers(0, 63), min_size=1, max_size=14)
rules = st.sampled_from(sorted(RULES))
temperatures = st.sampled_from([0.02, 0.1, 0.5, 3.0])
seeds = st.integers(0, 2**16)


def random_states(n: int, m: int, seed: int) -> torch.Tensor:
    return torch.randn(n, m, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@FAST
@given(models, prompts, rules, temperatures, st.sampled_from(["tokens", "heads", "neurons"]), st.booleans(), st.data())
def test_completeness(name, ids, rule, temperature, kind, exclude, data):
    dp = build(name, torch.float64)
    layer = data.draw(st.integers(0, 2))
    components = {"tokens": Tokens, "heads": Heads, "neurons": Neurons}[kind](layer)
    position = data.draw(st.integers(-len(ids), len(ids) - 1))
    result = dp.attribute(
        ids, components, allocation=rule, temperature=temperature, exclude_special=exclude, position=position
    )
    assert result.completeness_error <= 1e-12


@FAST
@given(models, prompts, st.integers(1, 5), rules, seeds)
def test_permuting_the_components_permutes_the_scores(name, ids, m, rule, seed):
    if rule == "max":  # equal gates: the first wins, so only distinct ones commute; random ones are
        m = max(m, 2)
    dp = build(name, torch.float64)
    states = random_states(len(ids), m, seed)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    one = dp.attribute(ids, Custom(1, states), allocation=rule).scores
    other = dp.attribute(ids, Custom(1, states[:, order]), allocation=rule).scores
    assert torch.allclose(other[:m], one[:m][order], atol=1e-10 * float(one.abs().max()))


@FAST
@given(models, prompts, st.integers(1, 1 << 18), rules, st.sampled_from([Tokens(), Tokens(1), Heads(0), Neurons(1)]))
def test_chunks_do_not_matter(name, ids, budget, rule, kind):
    dp = build(name)
    trace = dp.trace(ids)
    whole = dp.attribute(trace, kind, allocation=rule).scores
    parts = dp.attribute(trace, kind, allocation=rule, memory_budget=budget).scores
    assert torch.allclose(parts, whole, atol=1e-5 * float(whole.abs().max()))


@FAST
@given(models, st.lists(prompts, min_size=2, max_size=4), rules)
def test_batches_do_not_matter(name, batch, rule):
    dp = build(name, torch.float64)
    together = dp.attribute(batch, Tokens(), allocation=rule)
    for ids, result in zip(batch, together, strict=True):
        alone = dp.attribute(ids, Tokens(), allocation=rule)
        assert torch.allclose(result.scores, alone.scores, atol=1e-9 * float(alone.scores.abs().max()))


@FAST
@given(models, prompts, rules, seeds, st.integers(0, 3))
def test_zero_components_stay_zero(name, ids, rule, seed, zero):
    dp = build(name, torch.float64)
    states = random_states(len(ids), 4, seed)
    states[:, zero] = 0
    out = dp.decompose(ids, Custom(1, states), allocation=rule).dense()
    assert not out[:, zero].any()
    without = dp.decompose(ids, Custom(1, states[:, [m for m in range(4) if m != zero]]), allocation=rule).dense()
    others = [m for m in range(out.shape[1]) if m != zero]
    assert torch.allclose(out[:, others], without, atol=1e-9 * float(out.abs().max()))


@FAST
@given(models, prompts, rules)
def test_tokens_never_reach_back(name, ids, rule):
    """A token has no share in positions before it, and position 0 is all its own (and the constants')."""
    dp = build(name)
    state = dp.decompose(ids, Tokens(), allocation=rule).dense()
    n = len(ids)
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    assert not state[:, :n][later].any()
    assert state[:, :n].diagonal().any()


@FAST
@given(prompts, st.lists(st.integers(0, 63), min_size=1, max_size=4))
def test_scores_are_linear_in_the_target(ids, targets):
    dp = build("llama-gqa")
    several = dp.attribute(ids, Tokens(), [*targets, (targets[0], targets[-1])])
    for i, target in enumerate(targets):
        assert torch.allclose(several.scores[i], dp.attribute(ids, Tokens(), target).scores, atol=1e-6)
    contrast = several.scores[0] - several.scores[len(targets) - 1]
    assert torch.allclose(several.scores[-1], contrast, atol=1e-5)
