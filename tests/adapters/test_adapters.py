"""The parts of which the families' declarations are made, and models that are refused before any work."""

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from depass_fast import DePass, Heads, Neurons, Tokens
from depass_fast.adapters import Branch, Norm, adapt, without_biases
from depass_fast.adapters.recurrent import knows_recurrences
from tests.support.family_models import available, build_model, build_variant
from tests.support.models import random_ids

IDS = random_ids(7, seed=3)


@pytest.mark.parametrize("centred", [False, True])
def test_what_a_branch_writes_is_linear_in_it(centred):
    """A norm of the output is folded into the weight in front of it: the mean goes before γ."""
    draw = torch.randn(4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = Norm(draw[0, 0], 1e-5, draw[0, 1], centred)
    branch, weight, x, scale = Branch(None, norm, None, 0.7, 1.0), draw[1], draw[2], draw[3, 0].abs()
    folded = x @ branch.writing(weight, torch.float64).T * scale[:, None]
    assert torch.allclose(folded, branch.written(x @ weight.T, scale))
    y = x @ weight.T
    own = torch.nn.functional.layer_norm(y, (9,), norm.weight, norm.bias, norm.eps)
    if centred:
        whole = branch.written(y, norm.scale(y)) + branch.written_constant(None, norm.scale(y), torch.float64)
        assert torch.allclose(whole, own * 0.7)


@pytest.mark.parametrize(
    "name",
    [
        *("gemma2: tight caps", "opt: stream norms, projected embedding", "mixtral", "bloom", "cohere", "mpt", "gptj"),
        *("gpt_neo", "nanochat", "openai-gpt"),
    ],
)
def test_generation_and_contrasts(name):
    """A contrast of two tokens is the difference of their own results, each with its own cap."""
    if not available(name):
        pytest.skip("the installed transformers does not have it")
    dp = DePass(build_variant(name))
    generation = dp.attribute_generation(IDS, max_new_tokens=3, generation={"eos_token_id": None})
    assert generation.scores.shape == (3, 10) and generation.completeness_error < 1e-5
    with torch.no_grad():
        own = dp.model(torch.tensor([generation.input_ids])).logits[0]
    for step in generation.steps:
        logit = own[step.position, generation.input_ids[step.position + 1]]
        assert torch.allclose(step.target_logits, logit, atol=1e-4 * float(own.abs().max()))
    for kind in (Tokens(), Heads(0), Neurons(1)):
        pair, first, second = dp.attribute(IDS, kind, [(9, 3), 9, 3]).scores
        assert torch.allclose(pair, first - second, atol=1e-5 * float(first.abs().max()))
        logits = dp.attribute(IDS, kind, [(9, 3), 9, 3]).target_logits
        assert torch.allclose(logits[0], logits[1] - logits[2], atol=1e-4)


def test_a_prompt_longer_than_the_context_is_refused():
    for model_type in ("mpt", "gpt2", "llama", "codegen", "xglm", "openai-gpt"):
        with pytest.raises(ValueError, match="prompt: 65 tokens, but the model's context is 64"):
            DePass(build_model(model_type)).trace([1] * 65)
    model = build_model("bloom")
    del model.config.max_position_embeddings  # which BLOOM's own do not have: nothing limits it
    assert DePass(model).attribute([1] * 65, Tokens()).completeness_error < 1e-5


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "after the norms; not supported"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("gpt_bigcode", {"add_cross_attention": True, "multi_query": False}, "cross-attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "looks ahead"),
        ("bert", {}, "family 'bert' is not supported"),
        ("xglm", {"add_cross_attention": True}, "cross-attention"),
    ],
)
def test_what_is_refused(model_type, changes, message):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("the installed transformers does not have it")
    with pytest.raises(ValueError, match=message):
        DePass(build_model(model_type, **changes))


def test_a_clip_of_nothing_is_none():
    """MPT's own attention asks whether `clip_qkv` is true."""
    model, ids = build_model("mpt", attn_config={"clip_qkv": 0.0}), torch.tensor([IDS])
    dp = DePass(model)
    logits = dp.adapter.logits(dp.trace(IDS).normed_final)
    assert torch.allclose(logits, model(ids, use_cache=False).logits[0], atol=1e-5)
    assert dp.attribute(IDS, Heads(1)).completeness_error <= 1e-5


@pytest.mark.parametrize(("name", "path"), [("mixtral", "experts"), ("qwen2_moe", "shared_expert.down_proj")])
def test_experts_weights_are_checked_too(name, path):
    model = build_variant(name)
    layer = DePass(model).adapter.module(0, "mlp").get_submodule(path)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=f"{path.split('.')[0]}.*quantised .torch.float8_e4m3fn."):
        DePass(model)


@pytest.mark.parametrize(
    ("name", "option"),
    [("opt", "dropout"), ("starcoder2: window", "residual_dropout"), ("falcon: 7B", "hidden_dropout")],
)
def test_dropout_that_is_no_module_is_refused_in_training(name, option):
    model = build_variant(name)
    setattr(model.config, option, 0.1)
    with pytest.raises(ValueError, match=f"in training mode with dropout .*{option}.*model.eval"):
        DePass(model.train()).attribute(IDS, Tokens())
    assert DePass(model.eval()).attribute(IDS, Tokens()).completeness_error < 1e-5


def test_a_model_without_biases_is_a_view():
    """The published code drops them; the adapter itself, which a trace is taken with, keeps them."""
    adapter = adapt(build_variant("gpt2"))
    layer, bare = adapter.layer(1), without_biases(adapter).layer(1)
    assert layer.attention.has_bias and layer.has_mlp_bias and adapter.final_norm().bias is not None
    assert not bare.attention.has_bias and not bare.has_mlp_bias and without_biases(adapter).final_norm().bias is None
    assert bare.attention.constant(torch.float32) is None and without_biases(adapter).unembedding_bias is None
    assert torch.equal(bare.attention.w_o, layer.attention.w_o) and torch.equal(bare.mlp.w_gate, layer.mlp.w_gate)


@pytest.mark.parametrize("first", ["biased", "biasless"])
def test_a_trace_serves_a_model_with_and_without_its_biases(first):
    """A layer's constant is kept in the trace, and must not be that of the other."""
    model = build_model("qwen2", num_key_value_heads=2)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.bias.fill_(1.0)
    dp = DePass(model)
    record, span = dp.trace(random_ids(5)).layers[0].attention, slice(0, 5)
    adapters = {"biased": dp.adapter, "biasless": without_biases(dp.adapter)}
    found = {
        name: record.constant(adapters[name].attention(0), span, torch.float32)
        for name in sorted(adapters, key=lambda name: name != first)
    }
    assert found["biasless"] is None and found["biased"].norm() > 0


@pytest.mark.skipif(not knows_recurrences(), reason="the installed transformers is too old")
def test_recurrences_alone_have_no_longest_prompt():
    """RWKV's `context_length` is what it was trained with."""
    dp = DePass(build_model("rwkv", context_length=16))
    assert dp.adapter.context_length is None and dp.trace(random_ids(20)).n_prompts == 1
    assert DePass(build_variant("falcon_h1")).adapter.context_length == 64
