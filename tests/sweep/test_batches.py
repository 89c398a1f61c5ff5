"""Windows and batches: every prompt once, in bounds, of similar cost; failures where they belong."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depass_fast import Custom, Heads, Neurons, Tokens
from depass_fast.inputs.prompt_set import Item, PromptSet
from depass_fast.options import Options
from depass_fast.sweep.asked import Asked, Prepared, prepare
from depass_fast.sweep.batches import WINDOW_BATCHES, Cost, Costs, Limits, batches, windows
from depass_fast.sweep.failed import FailedPrompt


class Fixed(Costs):
    """Costs that are the lengths."""

    def of(self, prompt):
        n = len(prompt.ids)
        return Cost(float(n), 8 * n, n)


def prompts_of(lengths):
    ids = [torch.ones(n, dtype=torch.long) for n in lengths]
    return [Prepared(Item(str(i), None), one, None, (0,), False, ()) for i, one in enumerate(ids)]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80),
    flop=st.floats(1, 500),
    most=st.integers(1, 20),
    nbytes=st.floats(8, 2000),
)
@settings(max_examples=200, deadline=None)
def test_every_prompt_is_in_one_batch_and_limits_hold(lengths, flop, most, nbytes):
    costs, limits, prompts = Fixed(None), Limits(flop, most, nbytes), prompts_of(lengths)
    seen = []
    for window in windows(prompts, costs, limits):
        assert 1 <= len(window) <= WINDOW_BATCHES * most
        for batch in batches(window, costs, limits):
            assert 1 <= len(batch) <= most
            cost = [costs.of(one) for one in batch]
            assert len(batch) == 1 or sum(one.nbytes for one in cost) <= nbytes
            assert len(batch) == 1 or sum(one.flop for one in cost) <= 1.5 * flop + max(one.flop for one in cost)
            seen += [one.item.id for one in batch]
    assert sorted(seen, key=int) == [one.item.id for one in prompts]


def test_batches_are_of_similar_cost():
    random.seed(0)
    prompts = prompts_of([random.randint(5, 40) for _ in range(200)])
    costs = Fixed(None)
    found = batches(prompts, costs, Limits(1000.0, 200, float("inf")))
    sizes = [sum(costs.of(one).flop for one in batch) for batch in found]
    assert max(sizes) <= 1.2 * min(sizes) and len(found) == math.ceil(sum(sizes) / 1000)


def test_failures_keep_their_place_in_a_window():
    failure = FailedPrompt("x", "why", "ValueError")
    prompts = [*prompts_of([3, 4]), failure]
    assert list(windows(prompts, Fixed(None), Limits(100.0, 9, 1e9))) == [prompts]
    assert not failure, "it counts as false"


@pytest.mark.parametrize("kind", [Tokens(), Heads(layers="all"), Neurons(2), Neurons(layers="all")])
def test_costs_come_from_the_planner(demo, kind):
    costs = Costs(Asked(demo.adapter, demo.tokenizer, demo.options, kind))
    short, long = ([5] * n for n in (6, 40))
    found = [costs.of(prepare(costs.asked, Item("a", ids))) for ids in (short, long)]
    assert found[0].flop < found[1].flop and found[0].nbytes < found[1].nbytes
    plan = demo.plan(40, kind, measure=False)
    assert found[1].flop == pytest.approx(plan.flop, rel=0.3)  # the length is rounded up
    two = costs.of(prepare(costs.asked, Item("a", long, target=[1, 2])))
    assert two.numbers == 2 * found[1].numbers


def test_prompts_of_nearly_one_length_share_a_plan(demo, monkeypatch):
    costs = Costs(Asked(demo.adapter, None, demo.options, Tokens()))
    made = []
    plan = costs._plan
    monkeypatch.setattr(costs, "_plan", lambda *key: made.append(key) or plan(*key))
    for n in range(1, 200):
        costs.of(prepare(costs.asked, Item("a", [5] * n)))
    assert len(made) < 40


def test_components_of_one_length_are_planned_at_that_length(demo):
    states = torch.randn(7, 2, 128)
    asked = Asked(demo.adapter, None, demo.options, Custom(0, states=states))
    assert Costs(asked).of(prepare(asked, Item("a", [5] * 7))).numbers >= 2
    assert isinstance(prepare(asked, Item("a", [5] * 8)), FailedPrompt)


def test_a_prompt_at_fault_is_told_before_any_work(demo):
    asked = Asked(demo.adapter, demo.tokenizer, Options(), Tokens())
    assert "empty" in prepare(asked, Item("a", "")).reason
    assert isinstance(prepare(asked, Item("a", "Nyria")), Prepared)
    assert "2 tokens" in prepare(asked, Item("a", "Nyria", " Italian Italian")).reason
    assert "out of range" in prepare(asked, Item("a", "Nyria", position=99)).reason
    assert "context" in prepare(asked, Item("a", [5] * 600)).reason
    assert [one.id for one in PromptSet.of(["a"])] == ["0"]
