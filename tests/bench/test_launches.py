"""Upper bounds on what a GPU is launched to do for short work, where the host is what it waits for.

Counted on the meta device without the model's own operations, in a second call: the sizes of the weights are known.
They are near what is reached: more of them are a loss. Four per layer bring its weights to float16.
"""

import pytest

from bench.memory.meta import CountedRun, count

SHORT = [  # model, components, prompts of 20 tokens; operations per layer, and all others
    ("llama-2-7b", "tokens", 1, 17, 92),
    ("llama-2-7b", "tokens", 64, 17, 166),
    ("llama-2-7b", "heads of all layers", 1, 35, 71),
    ("qwen2-7b", "heads of all layers", 1, 43, 71),  # its values have biases
]
LINEAR = {"taylor": 9, "half": 28, "shapley": 40}  # operations per layer beside those of the softmax


def own(model, components, prompts, layers, rule="softmax"):
    case = CountedRun(model, components, (20,) * prompts, "triton", layers=layers, rule=rule)
    _, counted = count(case, again=True)
    return counted.own


@pytest.mark.parametrize(("rule", "beside"), LINEAR.items())
def test_a_linear_rule_is_few_launches_more(rule, beside):
    """Its coefficients are made once per layer, those of `shapley` at all nodes together."""
    for components in ("tokens", "heads of all layers"):
        (few, more), (plain, most) = (
            [own("llama-2-7b", components, 1, layers, one) for layers in (4, 8)] for one in (rule, "softmax")
        )
        assert (more - few) / 4 <= (most - plain) / 4 + beside


@pytest.mark.parametrize(("model", "components", "prompts", "per_layer", "others"), SHORT)
def test_short_work_is_few_launches(model, components, prompts, per_layer, others):
    few, more = (own(model, components, prompts, layers) for layers in (4, 8))
    each = (more - few) / 4
    assert each <= per_layer
    assert few - 4 * each <= others


@pytest.mark.parametrize(("model", "per_layer"), [("llama-2-7b", 21), ("qwen2-7b", 21)])
def test_a_forward_pass_of_our_own_is_fewer_than_the_models(model, per_layer):
    """Without attention; the model's own code takes 37."""
    few, more = (count(CountedRun(model, "tokens", (20,), "triton", layers=n))[1].places["model"] for n in (4, 8))
    assert (more - few) / 4 <= per_layer


def test_launches_do_not_grow_with_the_prompts():
    few, many = (own("llama-tiny", "tokens", prompts, 3) for prompts in (2, 48))
    assert few == many


def test_a_launch_is_counted_where_it_is_asked_for():
    _, counted = count(CountedRun("llama-2-7b", "tokens", (20,), "triton", layers=2))
    assert counted.places["model"] and counted.places["kernels/allocation.py allocate"] == 2
    assert counted.operations == counted.own + counted.places["model"] == sum(counted.places.values())


def test_a_ledger_of_a_large_model_is_few_launches():
    """Forward pass, way back and all answers, the forward pass among them: 32 layers."""
    few, more = (
        count(
            CountedRun("llama-2-7b", "tokens", (20,), "torch", layers=layers, call="ledger", rule="shapley"), again=True
        )[1]
        for layers in (4, 8)
    )
    assert few.operations + 28 * (more.operations - few.operations) / 4 <= 2102
