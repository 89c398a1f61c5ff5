"""TransformerLens' bridge stands for the model inside; a HookedTransformer does not."""

import pytest
import torch

from depass_fast import Custom, DePass, Heads, Neurons, Tokens
from depass_fast.demo import load_demo
from tests.support.family_models import build_model
from tests.support.models import FAMILIES, random_ids

lens = pytest.importorskip("transformer_lens")
bridge = pytest.importorskip("transformer_lens.model_bridge")
IDS = random_ids(7)
_, TOKENIZER = load_demo()


def boot(model):
    return bridge.TransformerBridge.boot_transformers("random", hf_model=model, tokenizer=TOKENIZER)


@pytest.mark.parametrize("name", FAMILIES)
def test_results_are_those_of_the_model_inside(name):
    model_type, changes = FAMILIES[name]
    model = build_model(model_type, **changes, tie_word_embeddings=False)
    kinds = (Tokens(), Heads(1), Neurons(2))
    oracle = [DePass(model).attribute(IDS, kind, [3, 5]) for kind in kinds]
    wrapped = boot(model)
    with torch.no_grad():
        before = wrapped(torch.tensor([IDS]))
    dp = DePass(wrapped)
    assert dp.tokenizer is wrapped.tokenizer
    for expected, kind in zip(oracle, kinds, strict=True):
        result = DePass(wrapped, None).attribute(IDS, kind, [3, 5])
        assert torch.equal(result.scores, expected.scores) and result.target_ids == expected.target_ids
        assert len(result.labels) == len(expected.labels) and result.completeness_error < 1e-5
    with torch.no_grad():
        assert torch.equal(wrapped(torch.tensor([IDS])), before)  # the bridge is left as it was
        assert torch.allclose(dp.model(torch.tensor([IDS])).logits, before, atol=1e-4)


@pytest.mark.parametrize("hook", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post"])
def test_hook_names_mean_what_the_bridge_records(hook):
    wrapped = boot(build_model("llama", num_key_value_heads=2))
    dp, name = DePass(wrapped), f"blocks.1.{hook}"
    _, cache = wrapped.run_with_cache(torch.tensor([IDS]))
    result = dp.attribute(IDS, Custom(name, 0.5 * cache[name][0, :, None].detach()), backend="reference")
    half, rest = result.scores
    assert float(half) == pytest.approx(float(rest), rel=1e-4)  # so that nothing but halves is left over


@torch.no_grad()
def test_hook_names_of_heads_and_neurons():
    wrapped = boot(build_model("llama", num_key_value_heads=2))
    dp = DePass(wrapped)
    _, cache = wrapped.run_with_cache(torch.tensor([IDS]))
    layer, trace = dp.adapter.layer(2), dp.trace(IDS)
    z = cache["blocks.2.attn.hook_z"][0].reshape(7, 4, 8)
    post = cache["blocks.2.mlp.hook_post"][0]
    for kind, expected in [
        (Heads("blocks.2.attn.hook_z"), torch.einsum("nhd,jhd->nhj", z, layer.attention.w_o.unflatten(1, (4, 8)))),
        (Neurons("blocks.2.mlp.hook_post"), post[..., None] * layer.mlp.w_down.T),
    ]:
        states = torch.empty_like(expected)
        kind.bound(dp.adapter, trace, 0).fill(states, dp.adapter, trace, 0)
        assert torch.allclose(states, expected, atol=1e-4)


def test_processed_weights_are_refused():
    wrapped = boot(build_model("llama", num_key_value_heads=2))
    wrapped.enable_compatibility_mode(no_processing=True)
    assert DePass(wrapped).attribute(IDS, Tokens()).completeness_error < 1e-5
    wrapped = boot(build_model("llama", num_key_value_heads=2))
    wrapped.enable_compatibility_mode()
    with pytest.raises(ValueError, match="the weights of this TransformerBridge have been processed"):
        DePass(wrapped)


def test_a_hooked_transformer_is_refused():
    try:
        config = lens.HookedTransformerConfig(n_layers=1, d_model=8, n_ctx=8, d_head=4, act_fn="relu", d_vocab=8)
    except ImportError:
        pytest.skip("TransformerLens 4 has none")
    with pytest.raises(ValueError, match="HookedTransformer holds processed copies.*TransformerBridge"):
        DePass(lens.HookedTransformer(config))


def test_weights_replaced_in_the_bridge_are_seen():
    model = build_model("llama", num_key_value_heads=2)
    wrapped = boot(model)
    dp = DePass(wrapped)
    first = dp.attribute(IDS, Tokens(), 3).target_logits
    model.load_state_dict({k: 1.3 * v for k, v in model.state_dict().items()}, assign=True)
    with torch.no_grad():
        logit = wrapped(torch.tensor([IDS]))[0, -1, 3]
    assert torch.allclose(dp.attribute(IDS, Tokens(), 3).target_logits, logit, atol=1e-4)
    assert not torch.allclose(first, logit, atol=1e-2)


def test_traces_fit_every_depass_of_one_bridge():
    wrapped = boot(build_model("llama", num_key_value_heads=2))
    first, second = DePass(wrapped), DePass(wrapped)
    assert torch.equal(second.attribute(first.trace(IDS), Tokens(), 3).scores, first.attribute(IDS, Tokens(), 3).scores)


def test_what_would_be_left_out_is_refused():
    model = build_model("llama", num_key_value_heads=2)
    wrapped = boot(model)
    with pytest.raises(ValueError, match="has been put into a TransformerBridge, which rewires it; give the bridge"):
        DePass(model)
    model = build_model("llama", num_key_value_heads=2)
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ValueError, match="LlamaDecoderLayer inside this bridge has had its forward replaced"):
        DePass(boot(model))
    wrapped._acts_to_saes = {"blocks.1.hook_out": object()}
    with pytest.raises(ValueError, match="dictionaries are spliced into this TransformerBridge"):
        DePass(wrapped)
