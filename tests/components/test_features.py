"""Features of a dictionary: a decomposition like any other, whatever the dictionary does to its input."""

import pytest
import torch

from depass_fast import Custom, Features
from depass_fast.backends.torch.backend import TorchBackend
from tests.support.components import Dictionary
from tests.support.models import build, random_ids

IDS = random_ids(7, seed=4)
SITES = ["resid_pre", "resid_mid", "resid_post"]


def residual(trace, layer, site):
    if site == "resid_mid":
        return trace.layers[layer].resid_mid
    return trace.resid(layer + (site == "resid_post"))


def dense(sae, x):
    """The states of all active features, their numbers, and the decoder's bias: (N, A, D), (A,), (D,)."""
    activations = sae.encode(x[None])[0]
    active = activations.any(0).nonzero().flatten()
    scale = sae.norm if isinstance(sae.norm, int) else sae.norm[0]
    return (activations * scale)[:, active, None] * sae.W_dec[active], active, sae.b_dec


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", [0, 2])
def test_scores_are_those_of_the_dense_states(site, layer, backend):
    dp, sae = build("llama-gqa"), Dictionary()
    trace = dp.trace(IDS)
    states, active, bias = dense(sae, residual(trace, layer, site))
    assert 2 < len(active) < 24
    result = dp.attribute(trace, Features(layer, sae, site), [3, 5], backend=backend)
    assert result.completeness_error < 1e-5
    assert (result.components, result.layer) == ("features", layer)
    assert result.labels == [*(f"L{layer}F{i}" for i in active.tolist()), "rest", "bias"]
    # the decoder's bias as a component of its own: this model has no constants
    split = torch.cat([states, bias.expand(len(IDS), 1, -1)], dim=1)
    same = dp.attribute(trace, Custom(layer, split, site=site), [3, 5], backend=backend).scores
    order = [*range(len(active)), len(active) + 1, len(active)]  # its bias comes before `rest`
    assert torch.allclose(result.scores, same[:, order], atol=1e-5 * float(same.abs().max()))


@pytest.mark.parametrize("name", ["llama-biases", "mistral-window", "qwen2", "qwen3-biases"])
def test_backends_agree_and_are_complete(name):
    dp = build(name)
    trace = dp.trace([IDS, IDS[:3]])  # their active features differ
    for site in SITES:
        kind = Features(1, Dictionary(), site)
        oracle = dp.decompose(trace, kind, backend="reference")
        state = dp.decompose(trace, kind, backend="torch")
        assert len(state.labels_of(0)) > len(state.labels_of(1))
        for p in range(2):
            assert state.labels_of(p) == oracle.labels_of(p)
            assert torch.allclose(state.dense(p), oracle.dense(p), atol=1e-5 * float(oracle.dense(p).abs().max()))
        for both, ids in zip(dp.attribute(trace, kind), (IDS, IDS[:3]), strict=True):
            alone = dp.attribute(ids, kind)
            assert both.labels == alone.labels
            assert both.completeness_error < 1e-5 and alone.completeness_error < 1e-5  # max() would pass over NaN
            assert torch.allclose(both.scores, alone.scores, atol=1e-5 * float(alone.scores.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dictionaries_of_any_dtype(dtype):
    dp = build("llama-gqa", torch.float64)
    assert dp.attribute(IDS, Features(1, Dictionary(dtype=dtype), "resid_post")).completeness_error < 1e-12


def test_a_dictionary_that_normalises_its_input():
    dp, sae = build("llama-gqa"), Dictionary(normalise=True)
    trace = dp.trace(IDS)
    states, active, _ = dense(sae, trace.resid(1))
    result = dp.attribute(trace, Features(1, sae, "resid_pre"))
    assert result.labels == [*(f"L1F{i}" for i in active.tolist()), "rest"]  # a scaled bias is no constant
    same = dp.attribute(trace, Custom(1, states)).scores
    assert result.completeness_error < 1e-5
    assert torch.allclose(result.scores, same, atol=1e-5 * float(same.abs().max()))


def test_a_perfect_dictionary_has_no_rest():
    dp, sae = build("llama-gqa"), Dictionary(size=64)
    sae.W_enc = torch.cat([torch.eye(32), -torch.eye(32)], dim=1)
    sae.W_dec, sae.b_dec, sae.b_enc = sae.W_enc.T.contiguous(), torch.zeros(32), torch.zeros(64)
    for prompt in (IDS, [IDS, IDS[:3]]):
        results = dp.attribute(prompt, Features(1, sae, "resid_mid"))
        for result in results if isinstance(results, list) else [results]:
            assert result.n_extras == 0 and result.completeness_error < 1e-5


@pytest.mark.parametrize(
    ("kind", "layer", "site"),
    [
        (lambda: Features(sae=Dictionary(hook="blocks.1.hook_resid_post")), 1, "resid_post"),
        (lambda: Features(2, Dictionary(hook="blocks.1.hook_resid_mid")), 2, "resid_mid"),
        (lambda: Features("blocks.2.hook_resid_pre", Dictionary(hook="blocks.1.hook_mlp_out")), 2, "resid_pre"),
        (lambda: Features(-1, Dictionary(), "resid_mid"), -1, "resid_mid"),
    ],
)
def test_layer_and_site(kind, layer, site):
    assert (kind().layer, kind().site) == (layer, site)
    assert build("llama-gqa").attribute(IDS, kind()).layer == layer % 3


def test_where_a_dictionary_belongs_is_checked():
    with pytest.raises(ValueError, match="layer, site: the dictionary names no hook"):
        Features(1, Dictionary())
    with pytest.raises(ValueError, match="sae: 'blocks.1.hook_mlp_out' does not fit here.*hook_resid_pre"):
        Features(sae=Dictionary(hook="blocks.1.hook_mlp_out"))
    with pytest.raises(ValueError, match="site: 'resid_mid' is not 'hook_resid_post'"):
        Features("blocks.1.hook_resid_post", Dictionary(), "resid_mid")
    with pytest.raises(TypeError, match="sae: expected a dictionary like SAE Lens', got Tensor without encode, decode"):
        Features(1, torch.zeros(3), "resid_pre")


def test_what_is_no_dictionary_of_this_model():
    dp = build("llama-gqa")
    transcoder, silent, bent = Dictionary(), Dictionary(), Dictionary()
    transcoder.cfg.d_out = 32
    silent.b_enc -= 1e6
    bent.decode = lambda activations: activations.square() @ bent.W_dec
    for sae, message in [
        (Dictionary(width=16), r"sae: its W_dec must have shape \(F, 32\), got \(24, 16\)"),
        (transcoder, "sae: a transcoder writes elsewhere"),
        (silent, "sae: none of its 24 features is active"),
        (bent, "sae: what Dictionary decodes is not its activations times W_dec"),
    ]:
        with pytest.raises(ValueError, match=message):
            dp.attribute(IDS, Features(1, sae, "resid_pre"))
    with pytest.raises(ValueError, match="site: 'middle' is not one of"):
        dp.attribute(IDS, Features(1, Dictionary(), "middle"))


def test_the_first_attention_sees_products(monkeypatch):
    seen = []
    aggregate = TorchBackend._aggregate_factors
    monkeypatch.setattr(TorchBackend, "_aggregate_factors", lambda *args: seen.append(args) or aggregate(*args))
    build("llama-gqa").decompose([IDS, IDS[:3]], Features(1, Dictionary(), "resid_post"), backend="torch")
    assert len(seen) == 1
