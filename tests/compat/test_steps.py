"""The published attributes, single steps and helpers: a loop of the user's own gives what the whole calls give."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from depass_fast.compat import decomposed_state_manager, utils
from depass_fast.compat.rules import RULES
from tests.support.family_models import build_model, build_variant
from tests.support.models import random_ids
from tests.support.published import load

IDS = random_ids(7)
PUBLISHED = {
    *("model", "tokenizer", "num_heads", "num_key_value_heads", "num_layers", "head_dim", "hidden_dim"),
    *("mlp_softmax_temp", "ignore_special_token", "attention_weight_compute", "mlp_decomposed_compute"),
    *("apply_rotary_pos_emb", "model_name", "states", "masks", "dropouts", "causals", "attribute_len"),
    *(f"mlp_decomposed_compute_{rule}" for rule in RULES),
    *("attn_decomposed_compute", "get_per_ffn2_values", "attn_head_contribution_compute"),
}


def ready(name: str = "llama_gqa", dtype: torch.dtype = torch.float32, **changes) -> decomposed_state_manager:
    subject = decomposed_state_manager(deepcopy(load(name)[0]).to(dtype), None, **changes)
    subject.get_states(IDS)
    return subject


def looped(subject: decomposed_state_manager, state: torch.Tensor, layers: range, ignore: bool) -> torch.Tensor:
    """The published loop: (M, N, D), changed in place."""
    seen = subject.masks, subject.dropouts, subject.causals
    for layer in layers:
        returned = subject.attn_decomposed_compute(layer, subject.states[2 * layer], *seen, state)
        assert returned.data_ptr() == state.data_ptr()
        subject.mlp_decomposed_compute(
            layer,
            subject.states[2 * layer + 1],
            state,
            subject.mlp_softmax_temp,
            ignore_special_token=ignore,
            cur_num=0,
        )
    return state


def test_every_published_attribute_is_there():
    subject = ready()
    for name in PUBLISHED:
        assert getattr(subject, name, None) is not None or name == "tokenizer", name
    count = subject.num_layers
    assert subject.masks == [None] * count and subject.causals == [True] * count and subject.dropouts == [0.0] * count
    assert subject.model_name == "llama" and ready("qwen2_gqa").model_name == "qwen"
    with pytest.raises(RuntimeError, match=r"masks: call get_states\(prompt\) first"):
        _ = decomposed_state_manager(subject.model, None).masks


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama_gqa", "qwen2_gqa"])
def test_a_loop_over_the_steps_is_the_whole_call(name, rule, ignore):
    # in float64: the softmax rule multiplies what the two ways round differently
    subject = ready(name, torch.float64, mlp_decomposed_function=rule, ignore_special_token=ignore)
    x = subject.states[0][0]
    tokens = torch.cat([torch.diag_embed(x.T, dim1=0, dim2=1), torch.zeros_like(x)[None]])  # the last: what they lack
    carried = looped(subject, tokens, range(subject.num_layers), ignore)[:-1]
    whole = subject.all_layer_to_init_attribute_state(IDS)[0][-1]
    assert torch.allclose(carried.transpose(0, 1), whole, atol=1e-10)
    part = torch.randn(3, 7, x.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = subject.get_subspace_decomposed_state_all_layer(IDS, 0, part)
    assert torch.allclose(
        looped(subject, part.clone(), range(1, subject.num_layers), False).transpose(0, 1), whole[-1], atol=1e-10
    )


@pytest.mark.parametrize("name", ["llama_gqa", "qwen2_gqa"])
def test_heads_and_neurons_of_a_layer(name):
    subject = ready(name)
    model, layer, x = subject.model, subject.model.model.layers[1], subject.states
    heads = subject.attn_head_contribution_compute(1, x[2], subject.masks, subject.dropouts, subject.causals, x[2])
    normed = layer.input_layernorm(x[2])
    values = normed @ layer.self_attn.v_proj.weight.T  # without V's bias, as published
    values = values.unflatten(-1, (-1, subject.head_dim)).transpose(1, 2)
    p = subject.attention_weight_compute(
        normed, layer.self_attn, 1, None, 0.0, True, subject.apply_rotary_pos_emb, subject.model_name
    )
    own = model.model(torch.tensor([IDS]), output_attentions=True).attentions[1]
    assert torch.allclose(p, own, atol=1e-5)
    mixed = (p @ utils.repeat_kv(values, subject.num_heads // subject.num_key_value_heads))[0]
    w_o = layer.self_attn.o_proj.weight.T.unflatten(0, (-1, subject.head_dim))  # (H, d, D)
    assert torch.allclose(heads, mixed @ w_o, atol=1e-4)
    normed = layer.post_attention_layernorm(x[3])
    neurons = subject.get_per_ffn2_values(normed, 1)
    assert torch.equal(layer.mlp.down_proj(neurons), layer.mlp(normed))


def test_steps_refuse_what_was_not_in_the_forward_pass():
    subject = decomposed_state_manager(build_model("llama"), None)
    state = torch.zeros(2, 7, 32)
    with pytest.raises(RuntimeError, match=r"call get_states\(prompt\) first"):
        subject.mlp_decomposed_compute(0, state[0], state)
    x = subject.get_states(IDS)
    seen = subject.masks, subject.dropouts, subject.causals
    with pytest.raises(ValueError, match=r"state: it is not that of the last forward pass.*give states\[3\]"):
        subject.mlp_decomposed_compute(1, x[2], state)
    with pytest.raises(ValueError, match=r"give states\[0\]"):
        subject.attn_decomposed_compute(0, 2 * x[0], *seen, state)
    with pytest.raises(ValueError, match="layer_idx: 3 is out of range; allowed are 0 to 2"):
        subject.get_per_ffn2_values(x[0], 3)
    shut = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="masks, dropouts, causals: they are not those of the last forward pass"):
        subject.attn_decomposed_compute(0, x[0], [shut] * 3, *seen[1:], state)
    subject.model.model.layers[1].mlp.up_proj.weight.data.mul_(2)
    subject.mlp_decomposed_compute(0, x[1], state)
    with pytest.raises(ValueError, match="layer_idx: the model has changed since get_states"):
        subject.mlp_decomposed_compute(1, x[3], state)
    parallel = decomposed_state_manager(build_variant("gpt_neox: parallel"), None)
    with pytest.raises(ValueError, match="single steps are for layers with one MLP, which follows the attention"):
        parallel.mlp_decomposed_compute(0, parallel.get_states(IDS)[1], state)


def test_masks_of_a_sliding_window():
    model = build_model("mistral", sliding_window=3, num_key_value_heads=2)
    subject = decomposed_state_manager(model, None)
    subject.get_states(IDS)
    places = torch.arange(7)
    back = places[:, None] - places
    assert all(torch.equal(mask[0, 0], (back >= 0) & (back < 3)) for mask in subject.masks)
    assert subject.causals == [False] * 3


# -- subspaces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha"])
def test_minus_one_starts_subspaces_before_the_first_layer(name, corrected):
    subject = ready(name, corrected=corrected)
    x, final = subject.states[0][0], subject.states[-1][0]
    parts = torch.stack([0.3 * x, 0.7 * x])
    layers = subject.get_subspace_decomposed_state_all_layer(IDS, -1, parts)
    assert len(layers) == subject.num_layers and layers[0].shape == (7, 2 + corrected, x.shape[1])
    for state, after in zip(layers, [*subject.states[2:-1:2], final[None]], strict=True):
        assert float((state.sum(1) - after[0]).norm() / after.norm()) < 1e-5
    whole = subject.get_subspace_decomposed_state(IDS, -1, parts)
    assert torch.equal(subject.get_subspace_decomposed_state(IDS, -1, parts.numpy()), whole)
    assert torch.equal(subject.get_subspace_decomposed_state_all_layer(IDS, -1, parts.numpy())[-1], layers[-1])
    assert torch.allclose(whole.sum(1), subject.model.model.norm(final), atol=1e-4)
    with pytest.raises(ValueError, match="start_layer_idx: -2 is out of range; subspaces start after layer 0 to ., or"):
        subject.get_subspace_decomposed_state(IDS, -2, parts)
    assert subject.get_subspace_decomposed_state_all_layer(IDS, subject.num_layers - 1, parts) == []


@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float64])
def test_subspaces_keep_the_dtype_that_they_were_given_in(own, given):
    """The published code adds to the given tensor; the final norm widens it to the model's dtype."""
    model = build_model("llama").to(own)
    subject = decomposed_state_manager(model, None)
    x = subject.get_states(IDS)[2][0]
    parts = torch.stack([0.25 * x, 0.75 * x]).to(given)
    before = parts.clone()
    state = subject.get_subspace_decomposed_state(IDS, 0, parts)
    layers = subject.get_subspace_decomposed_state_all_layer(IDS, 0, parts)
    assert state.dtype == torch.promote_types(own, given) and {s.dtype for s in layers} == {given}
    assert torch.equal(parts, before), "published: changed in place"
    if given == torch.float64:
        exact = decomposed_state_manager(build_model("llama").to(own).double(), None)
        exact.get_states(IDS)
        drift = (state - exact.get_subspace_decomposed_state(IDS, 0, parts)).abs().max()
        assert drift < (1e-12 if own == torch.float64 else 1e-4 if own == torch.float32 else 1)
    subject = decomposed_state_manager(model, None, state_dtype="float32")
    assert subject.get_subspace_decomposed_state(IDS, 0, parts).dtype == state.dtype


# -- helpers --------------------------------------------------------------------------------------------------------


def test_probabilities_of_a_state():
    model, tokenizer = load("llama_mha")[0], type("Tokenizer", (), {"decode": lambda self, ids: f"<{ids[0]}>"})()
    hidden = model.model(torch.tensor([IDS])).last_hidden_state
    best = model.lm_head(hidden[0, -1]).softmax(-1).topk(3)
    for state in (hidden[0, -1], hidden[:1, -1]):
        found = utils.from_states_to_probs(state, model.lm_head, tokenizer, topk=3)
        assert [(i, t) for i, t, _ in found] == [(i, f"<{i}>") for i in best.indices.tolist()]
        assert torch.allclose(torch.tensor([p for *_, p in found]), best.values, atol=1e-6)
    with pytest.raises(ValueError, match=r"states: expected one state \(D,\), got \(1, 7, "):
        utils.from_states_to_probs(hidden, model.lm_head, tokenizer)


def test_streams_and_hooks():
    model = load("llama_gqa")[0]
    model(torch.tensor([IDS]), output_hidden_states=True)  # transformers' own hooks stay
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with utils.hook_manager(model) as (before, between, after):
        hidden = model(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    stream, attended, normed = utils.get_stream_from_prompt(None, model, IDS)
    count = len(model.model.layers)
    assert (len(stream), len(attended), len(normed), len(after)) == (2 * count + 1, count, count + 1, count)
    for layer in range(count):
        assert torch.allclose(stream[2 * layer], before[layer], atol=1e-4)
        assert torch.allclose(stream[2 * layer + 1], between[layer], atol=1e-4)
        assert torch.allclose(attended[layer], between[layer], atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(normed, hidden, strict=True))
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_attention_is_captured(monkeypatch):
    attention, captured = utils.capture_sdpa()
    q, k, v = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), expected)
    assert captured() == ([None], [0.0], [True])


def test_the_scale_of_a_norm_survives_float16():
    """The published one squares in float16: it returns zeros where a state is larger than 255, and so does its code."""
    norm = load("llama_mha")[0].model.norm
    x = torch.full((1, norm.weight.numel()), 300.0)
    assert torch.allclose(utils.get_rmsnorm_scaling(norm, x) * x, norm(x), rtol=1e-5)
    assert not torch.rsqrt(x.half().pow(2).mean(-1)).any()
    assert torch.allclose(utils.get_rmsnorm_scaling(norm, x.half()).float() * x, norm(x), rtol=2e-3)


def test_rotary_embeddings_take_tables_both_ways():
    q, k = torch.randn(2, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    expected = utils.apply_rotary_pos_emb_llama(q, k, angle.cos()[None], angle.sin()[None])
    assert torch.allclose(expected[0].norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    for positions in (None, torch.arange(5)[None]):
        found = utils.apply_rotary_pos_emb_qwen(q, k, angle.cos(), angle.sin(), positions)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_attention_of_another_kind_is_named():
    layer, x = build_model("llama").model.layers[0], torch.zeros(1, 3, 32)
    rotate = utils.apply_rotary_pos_emb_llama
    with pytest.raises(ValueError, match="dropout_p: 0.1 makes the probabilities random; give 0"):
        utils.compute_attention_weights_mha(x, layer.self_attn, 0, None, 0.1, True, rotate, "llama")
    with pytest.raises(ValueError, match="attn_layer: a LlamaMLP is none of Llama's or Qwen2's kind"):
        utils.compute_attention_weights_mha(x, layer.mlp, 0, None, 0.0, True, rotate, "llama")
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    p = [utils.compute_attention_weights_mha(x, layer.self_attn, 0, *m, rotate, "llama") for m in _same(mask)]
    assert torch.equal(p[0], p[1]) and torch.equal(p[0], p[2])


def _same(mask: torch.Tensor) -> list[tuple]:
    return [(None, 0.0, True), (mask, 0.0, False), (torch.zeros(3, 3).masked_fill(~mask, -torch.inf), 0.0, False)]
