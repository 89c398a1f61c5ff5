"""SAE Lens' dictionaries as components."""

import pytest
import torch

from depass_fast import Custom, DePass, Features
from tests.support.family_models import build_model
from tests.support.models import build, random_ids

saes = pytest.importorskip("sae_lens.saes")
SAEMetadata = pytest.importorskip("sae_lens.saes.sae").SAEMetadata
IDS = random_ids(8)

CASES = {
    "standard": (saes.StandardSAE, saes.StandardSAEConfig, {}),
    "bias only out": (saes.StandardSAE, saes.StandardSAEConfig, {"apply_b_dec_to_input": False}),
    "layer norm": (saes.StandardSAE, saes.StandardSAEConfig, {"normalize_activations": "layer_norm"}),
    "constant norm": (saes.StandardSAE, saes.StandardSAEConfig, {"normalize_activations": "constant_norm_rescale"}),
    "jumprelu": (saes.JumpReLUSAE, saes.JumpReLUSAEConfig, {}),
    "gated": (saes.GatedSAE, saes.GatedSAEConfig, {}),
    "topk": (saes.TopKSAE, saes.TopKSAEConfig, {"k": 5}),
    "topk, rescaled": (saes.TopKSAE, saes.TopKSAEConfig, {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "matching pursuit": (saes.MatchingPursuitSAE, saes.MatchingPursuitSAEConfig, {}),
}


def make(name: str, hook: str = "blocks.1.hook_resid_post", width: int = 32):
    cls, config, changes = CASES[name]
    sae = cls(config(d_in=width, d_sae=40, metadata=SAEMetadata(hook_name=hook), **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).abs_() * 0.1)
        sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=generator) * 0.2)
        if hasattr(sae, "W_enc") and isinstance(sae.W_enc, torch.nn.Parameter):
            sae.W_enc.copy_(sae.W_dec.T)
        if isinstance(getattr(sae, "b_enc", None), torch.nn.Parameter):
            sae.b_enc.neg_()
    return sae


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_dense_states(name, backend):
    dp, sae = build("llama-gqa"), make(name)
    trace = dp.trace(IDS)
    x = trace.resid(2)[None]
    result = dp.attribute(trace, Features(sae=sae), 3, backend=backend)
    assert (result.layer, result.components) == (1, "features") and result.completeness_error < 1e-5
    with torch.no_grad():
        activations = sae.encode(x)
        decoded = sae.decode(activations)[0]
        one = torch.zeros_like(activations)
        states = []
        active = activations[0].any(0).nonzero().flatten()
        for feature in active:  # alone, by the dictionary's own decoder
            one.zero_()[..., feature] = activations[..., feature]
            sae.encode(x)
            states.append(sae.decode(one)[0])
        sae.encode(x)
        nothing = sae.decode(one.zero_())[0]
    states = torch.stack(states, dim=1) - nothing[:, None]
    assert torch.allclose(states.sum(1) + nothing, decoded, atol=1e-4)
    assert result.labels[: len(active)] == [f"L1F{i}" for i in active.tolist()]
    normalises = sae.cfg.normalize_activations != "none"
    has_bias = not normalises and bool(nothing.any())
    assert result.labels[len(active) :] == (["rest", "bias"] if has_bias else ["rest"])
    if has_bias:
        states = torch.cat([states, nothing[:, None]], dim=1)
    same = dp.attribute(trace, Custom("blocks.1.hook_resid_post", states), 3, backend=backend).scores
    if has_bias:
        same = torch.cat([same[: len(active)], same[-1:], same[-2:-1]])
    assert torch.allclose(result.scores, same, atol=2e-5 * float(same.abs().max()))


@pytest.mark.parametrize("hook", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post"])
def test_the_site_is_the_dictionarys_own(hook):
    kind = Features(sae=make("standard", f"blocks.2.{hook}"))
    assert (kind.layer, kind.site) == (2, hook.removeprefix("hook_"))
    assert build("qwen2").attribute([IDS, IDS[:4]], kind)[1].completeness_error < 1e-5


def test_dictionaries_of_other_places():
    with pytest.raises(ValueError, match="sae: 'blocks.1.hook_mlp_out' does not fit here"):
        Features(sae=make("standard", "blocks.1.hook_mlp_out"))
    with pytest.raises(ValueError, match="sae: its W_dec must have shape"):
        build("llama-gqa").attribute(IDS, Features(sae=make("standard", width=16)))
    config = saes.TranscoderConfig(d_in=32, d_out=32, d_sae=40, apply_b_dec_to_input=False)
    with pytest.raises(ValueError, match="sae: a transcoder writes elsewhere"):
        build("llama-gqa").attribute(IDS, Features("blocks.1.hook_resid_pre", saes.Transcoder(config)))


def test_half_precision_dictionaries_at_large_norms():
    """The first position of real models has norms of hundreds: squares overflow in float16."""
    model = build_model("llama", num_key_value_heads=2)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1000)
    dp, sae = DePass(model), make("standard")
    exact = dp.attribute(IDS, Features(sae=sae), 3)
    result = dp.attribute(IDS, Features(sae=sae.to(torch.float16)), 3)
    assert result.completeness_error < 1e-4 and exact.completeness_error < 1e-5


@pytest.mark.parametrize("name", ["constant norm", "layer norm", "standard"])
def test_the_dictionary_is_left_as_it_was(name):
    dp, sae = build("llama-gqa"), make(name)
    x = dp.trace(IDS).resid(2)[None]
    with torch.no_grad():
        activations = sae.encode(x)
        expected = sae.decode(activations)
        activations = sae.encode(x)
        dp.attribute(IDS[:3], Features(sae=sae), 3)
        assert torch.equal(sae.decode(activations), expected)


def test_nan_in_a_dictionary_is_named():
    sae = make("standard")
    with torch.no_grad():
        sae.W_dec[3] = float("nan")
    with pytest.raises(FloatingPointError, match="sae: its activations or what it decodes hold NaN or inf in prompt 0"):
        build("llama-gqa").attribute(IDS, Features(sae=sae), 3)
    with pytest.raises(TypeError, match="give the dictionary by its name"):
        Features(sae)


def test_a_dictionary_per_layer():
    dp, names = build("llama-gqa"), ("standard", "jumprelu", "layer norm")
    saes = [make(name, f"blocks.{layer}.hook_resid_post") for layer, name in enumerate(names)]
    found = dp.attribute(IDS, Features(layers="all", sae=saes[::-1]), 3)
    modules = torch.nn.ModuleDict({f"layer{layer}": sae for layer, sae in enumerate(saes)})
    same = dp.attribute(IDS, Features(layers="all", sae=list(modules.values())), 3)
    for layer, sae in enumerate(saes):
        alone = dp.attribute(IDS, Features(sae=sae), 3)
        for result in (found[layer], same[layer]):
            assert result.labels == alone.labels and result.completeness_error < 1e-5
            assert torch.allclose(result.scores, alone.scores, atol=1e-5 * float(alone.scores.abs().max()))
