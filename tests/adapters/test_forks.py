"""A user's own fork of a supported model works, or is refused with the reason."""

import gc
import weakref

import pytest
import torch
from transformers import Gemma2Config

from depass_fast import DePass, Heads, Tokens
from depass_fast.adapters import family_of
from depass_fast.trace.size import trace_nbytes
from tests.support.family_models import build_model
from tests.support.forks import OwnConfig, fork
from tests.support.models import build, random_ids

IDS = random_ids(8)


class OwnerConfig(OwnConfig):
    model_type = "owner"


def test_a_subclass_is_taken_for_its_family():
    model = fork()
    dp = DePass(model)
    for kind in (Tokens(), Heads(1)):
        expected = build("llama-gqa").attribute(IDS, kind)
        assert torch.equal(dp.attribute(IDS, kind).scores, expected.scores)
    assert model.config.model_type == "own"
    assert trace_nbytes(model.config, [8], torch.float32) == dp.trace(IDS).nbytes


def test_the_most_specific_supported_family():
    assert family_of(OwnerConfig()) == "llama"

    class OwnGemma(Gemma2Config):
        model_type = "own_gemma"

    assert family_of(OwnGemma()) == "gemma2"


def test_modules_that_are_not_where_the_family_keeps_them():
    model = fork()
    mlp = model.model.layers[1].mlp
    mlp.first = mlp.gate_proj
    del mlp.gate_proj
    with pytest.raises(
        ValueError, match="OwnForCausalLM has no model.layers.1.mlp.gate_proj, where the family 'llama'"
    ):
        DePass(model)


@pytest.mark.parametrize("how", ["model", "in place", "below", "layers", "projections", "forward"])
def test_compiled_models_are_traced_uncompiled(how):
    model = build_model("llama", num_key_value_heads=2)
    layers, given = model.model.layers, model
    if how == "model":
        given = torch.compile(model)
    elif how == "in place":
        model.compile()
    elif how == "below":
        model.model.compile()
    elif how == "layers":
        for index in range(3):
            layers[index] = torch.compile(layers[index])
    elif how == "projections":
        for layer in layers:
            layer.self_attn.v_proj, layer.mlp.down_proj = map(
                torch.compile, (layer.self_attn.v_proj, layer.mlp.down_proj)
            )
    else:
        model.model.forward = torch.compile(model.model.forward)
    expected = build("llama-gqa").attribute(IDS, Tokens())
    for _ in range(2):
        assert torch.equal(DePass(given).attribute(IDS, Tokens()).scores, expected.scores)


def test_a_pruned_model():
    model = build_model("llama", num_key_value_heads=2)
    del model.model.layers[0]
    dp, ids = DePass(model), torch.tensor([IDS])
    assert torch.allclose(
        dp.adapter.logits(dp.trace(IDS).normed_final), model(ids, use_cache=False).logits[0], atol=1e-5
    )
    assert dp.attribute(IDS, Heads(1)).completeness_error <= 1e-5


def test_packed_prompts_of_a_fork_that_hides_its_arguments():
    """Its learned positions start over at every prompt all the same."""
    model = build_model("gpt2")
    forward = type(model.transformer).forward

    class Hidden(type(model.transformer)):
        def forward(self, *args, **kwargs):
            return forward(self, *args, **kwargs)

    model.transformer.__class__ = Hidden
    dp = DePass(model)
    trace = dp.trace([IDS, IDS[:3]])
    own = model(torch.tensor([IDS[:3]])).logits[0]
    assert torch.allclose(dp.adapter.logits(trace.normed_final[trace.span(1)]), own, atol=1e-5)


def test_a_model_is_not_kept_alive():
    model = build_model("llama", num_key_value_heads=2)
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward  # a bound method of its own
    gone = weakref.ref(model)
    DePass(model).trace(IDS)
    del model
    gc.collect()
    assert gone() is None
