"""Heads without a component, against the model's own code with that component taken out of its input."""

import copy

import numpy as np
import pytest
import torch

from depass_fast import Custom, DePass, Heads
from depass_fast.evaluate.relooked import probabilities_of
from depass_fast.looking.freeze import freeze_sides
from depass_fast.looking.turned import turns_of
from tests.looking.test_turns import by_hand
from tests.support.family_models import available, build_variant
from tests.support.models import build, random_ids

IDS = random_ids(7)
FAMILIES = [
    *("llama: GQA", "gemma2: tight caps", "gemma3_text", "mistral: window", "qwen3", "olmo2: biases", "gpt2", "bloom"),
    *("mpt", "falcon: RW, ALiBi", "gptj", "phi: QK norms", "deepseek_v3", "minicpm3", "cohere: QK norms"),
]


def parts_of(dp: DePass) -> torch.Tensor:
    """Three random parts (N, 3, D) of the states at the input of the first layer, as large as these."""
    x = dp.trace(IDS).resid(0)
    return torch.randn(len(IDS), 3, x.shape[1], generator=torch.Generator().manual_seed(1)).to(x) * x.std()


def queries_and_keys(dp: DePass, missing: torch.Tensor):
    """The queries and keys that the model's own code makes in layer 0 of its input less ``missing`` (N, D)."""

    def less(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (
            ((hidden - missing, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden - missing})
        )

    hook = dp.adapter.block(0).register_forward_pre_hook(less, with_kwargs=True)
    try:
        attention = dp.trace(IDS).layers[0].attention
    finally:
        hook.remove()
    return attention.q, attention.k


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_it_is_what_the_model_does(name):
    if not available(name):
        pytest.skip("not in this version of transformers")
    dp, query = DePass(build_variant(name)), 5
    parts, trace = parts_of(dp), dp.trace(IDS)
    record = trace.layers[0].attention
    why = dp.explain_attention(trace, Custom(0, parts), 0, query=query)
    turns = turns_of(dp.adapter, [torch.tensor(IDS)], [0])[0][0]
    sides = freeze_sides(dp.adapter, 0, record, trace.span(0), turns, torch.float32)
    for m in range(3):
        q, k = queries_and_keys(dp, parts[:, m])
        for side, of_q, of_k in (("query", q, record.k), ("key", record.q, k), ("both", q, k)):
            own = copy.replace(sides, q=of_q, k=of_k) if hasattr(copy, "replace") else _with(sides, of_q, of_k)
            for head in why.heads:
                wanted = probabilities_of(own, record, head)[query, : query + 1]
                assert torch.allclose(why.without(side, head=head)[m], wanted, atol=2e-5), (side, m, head)


def _with(sides, q, k):
    return type(sides)(sides.of_q, sides.of_k, q, k, sides.off, sides.sink)


@torch.no_grad()
def test_norms_that_are_held_do_not_react():
    dp = build("llama-gqa")
    parts, trace, norm = parts_of(dp), dp.trace(IDS), dp.model.model.layers[0].input_layernorm
    why = dp.explain_attention(trace, Custom(0, parts), 0, 2)
    x = trace.resid(0)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    left, attention = (x - parts[:, 1]) * scale * norm.weight, dp.model.model.layers[0].self_attn
    q, k = (
        by_hand(dp.model, projection(left).unflatten(-1, (heads, -1)).transpose(0, 1)[None])[0].transpose(0, 1)
        for projection, heads in ((attention.q_proj, 4), (attention.k_proj, 2))
    )
    record = trace.layers[0].attention
    wanted = ((q[-1, 2] * k[:, 1]).sum(-1) * record.scale).softmax(-1)
    assert torch.allclose(why.without(norms="held")[1], wanted, atol=1e-5)
    assert not torch.allclose(why.without(norms="react")[1], wanted, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_taken_out_changes_nothing(dtype):
    dp = DePass(build_variant("llama: GQA").to(dtype))
    states = torch.zeros(len(IDS), 2, 32, dtype=dtype)
    states[:, 1] = dp.trace(IDS).resid(0)
    why = dp.explain_attention(IDS, Custom(0, states), 0, 1)
    for norms in ("react", "held"):
        assert torch.allclose(why.without(norms=norms)[0], why.probabilities, atol=1e-6)


def test_several_heads_and_copies():
    dp = build("llama-gqa")
    several, one = (dp.explain_attention(IDS, Heads(0), 2, head) for head in ([3, 0], 3))
    assert several.without(head=3).shape == (len(several.labels), len(IDS))
    assert torch.allclose(several.without(head=3), one.without(), atol=1e-6)
    for made in (copy.copy(one), copy.deepcopy(one)):
        assert torch.equal(made.without(), one.without()) and made.pairs(4, 2) == one.pairs(4, 2)
    assert np.allclose(one.without().sum(-1), 1.0, atol=1e-5)
