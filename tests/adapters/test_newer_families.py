"""Families of newer_variants.py: what test_families.py does not ask, streaming, verification and the adjoint sweep."""

import functools

import pytest
import torch

from depass_fast import DePass, Heads, Neurons, Tokens
from depass_fast.linear_rules import frozen_up, linear_shares
from tests.support.components import is_there
from tests.support.family_models import VARIANTS, available, build_model, build_variant
from tests.support.models import random_ids
from tests.support.newer_variants import NEWER, NEWER_MIXERS

IDS = random_ids(7)

every_name = pytest.mark.parametrize("name", [name for name in (*NEWER, *NEWER_MIXERS) if available(name)])


@functools.lru_cache(maxsize=1)
def built(name):
    return DePass(build_variant(name).double(), progress=False)


@every_name
def test_streamed_and_verified(name):
    """All backends that carry a state agree, and a sample is recomputed by the reference."""
    dp = built(name)
    for kind in (kind for kind in (Tokens(), Heads(1), Neurons(0)) if is_there(dp, kind)):
        plain = dp.attribute(IDS, kind, 5, verify=True)
        streamed = dp.attribute(IDS, kind, 5, stream=True)
        assert plain.verification.passed and streamed.labels == plain.labels
        assert torch.allclose(streamed.scores, plain.scores, rtol=0, atol=1e-9 * float(plain.scores.abs().max()))


@every_name
def test_the_softmax_adjoint_approximates_or_is_refused_by_name(name):
    dp = built(name)
    neurons = Neurons(next(index for index in range(dp.adapter.n_layers) if dp.adapter.has_mlp(index)))
    if dp.adapter.mixes_plainly and not dp.adapter.weighs_inputs:
        swept, exact = (dp.attribute(IDS, neurons, 5, method=how) for how in ("adjoint", "exact"))
        assert float(swept.scores.sum()) == pytest.approx(float(exact.scores.sum()), rel=1e-2)
        return
    with pytest.raises(ValueError, match="'adjoint' under 'softmax' is"):
        dp.attribute(IDS, neurons, 5, method="adjoint")


@pytest.mark.parametrize("name", [name for name in ("bitnet", "llama4_text") if available(name)])
def test_half_of_an_activation_is_the_up_projections(name):
    """Under `half`, with the factors that stand in front of an expert, or behind the activation."""
    dp = built(name)
    trace = dp.trace(IDS)
    for index, layer in enumerate(trace.layers):
        for part in layer.mlps:
            mlp = dp.adapter.mlps(index)[part.part]
            shares = linear_shares("half", mlp, part, slice(None), torch.float64)
            up = frozen_up(mlp, part, torch.arange(len(part.act)), torch.float64)
            assert torch.allclose(shares.up * up, part.act / 2, rtol=0, atol=1e-7 * float(part.act.abs().max()))


@pytest.mark.skipif(not available("bitnet"), reason="not in this version of transformers")
def test_a_bitnet_that_rounds_in_every_forward_pass_is_refused():
    from transformers.integrations.bitnet import AutoBitLinear

    model = build_variant("bitnet")
    for layer in model.model.layers:
        layer.mlp.down_proj = AutoBitLinear(48, 32, bias=False)
    with pytest.raises(ValueError, match="rounds its weight to three values"):
        DePass(model).attribute(IDS, Tokens(), 5)


@pytest.mark.skipif(not available("nemotron_h"), reason="this transformers does not know the family")
def test_all_layers_are_those_that_have_what_is_asked_for():
    """Nemotron-H's layers mix positions or have an MLP, never both."""
    dp = built("nemotron_h")
    assert dp.attribute(IDS, Neurons(layers="all"), 5).layers == [1, 3]
    assert dp.attribute(IDS, Heads(layers="all"), 5).layers == [0, 2]
    book = dp.ledger(IDS, 5, position=-2)
    assert {entry.label[:2] for entry in book.top(9, kinds=["neurons"])} <= {"L1", "L3"} and dp.report(IDS, 5).sheets
    with pytest.raises(ValueError, match="layer 0 has no neurons"):
        dp.attribute(IDS, Neurons(0), 5)


@pytest.mark.skipif(not available("doge"), reason="not in this version of transformers")
def test_what_a_doge_cannot_do_is_refused():
    with pytest.raises(ValueError, match="of 7 tokens every head of this model selects 5 keys of its own"):
        DePass(build_model("doge", **VARIANTS["doge"][1], keep_window_size=5)).attribute(IDS, Tokens(), 5)
    with pytest.raises(ValueError, match="its routing looks ahead"):
        DePass(build_model("doge", **{**VARIANTS["doge"][1], "is_moe": True}))
    model = build_variant("doge")
    model.model.layers[1].input_residual.data[3] = 0.0
    with pytest.raises(ValueError, match="a factor of its residual stream is zero in some channel"):
        DePass(model)
