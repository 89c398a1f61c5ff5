"""Models that PEFT has wrapped: what its adapters add is part of the weights, as if it had been merged."""

import copy

import pytest
import torch

from depass_fast import DePass, Heads, Modules, Neurons, Tokens
from depass_fast.trace.activations import check_activations
from tests.support.family_models import build_model
from tests.support.models import random_ids

peft = pytest.importorskip("peft")

IDS = random_ids(7)
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
KINDS = (Tokens(), Heads(1), Modules(0), Neurons(1))
CONFIGS = {
    "LoRA": peft.LoraConfig(r=4, target_modules=TARGETS),
    "rsLoRA": peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "DoRA": peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "LoRA with dropout": peft.LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.5),
    "LoHa": peft.LoHaConfig(r=4, target_modules=TARGETS),
    "LoKr": peft.LoKrConfig(r=4, target_modules=TARGETS),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS),
}


def randomised(model, seed: int = 1):
    """Adapters start with nothing to add: give them something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "hada_" in name or "lokr_" in name:
                if "magnitude" in name:
                    parameter.mul_(1.0 + 0.3 * torch.randn_like(parameter))
                else:
                    parameter.normal_(0.0, 0.3)
    return model.eval()


def wrapped(config, model_type="llama", **changes):
    changes = changes or {"num_key_value_heads": 2, "tie_word_embeddings": False}
    return randomised(peft.get_peft_model(build_model(model_type, **changes), config))


def check(model, oracle):
    """``model`` gives the scores of the plain model ``oracle``, for every kind, and they are complete."""
    dp, plain = DePass(model), DePass(oracle)
    for kind in KINDS:
        result = dp.attribute(IDS, kind, [None, 5])
        expected = plain.attribute(IDS, kind, [None, 5])
        scale = float(expected.scores.abs().max())
        assert torch.allclose(result.scores, expected.scores, atol=1e-4 * scale), kind
        assert result.completeness_error < 2e-5
    check_activations(dp.adapter, dp.trace(IDS))
    why, other = (one.explain_attention(IDS, Tokens(), 1) for one in (dp, plain))
    assert why.completeness_error < 2e-5 and torch.allclose(why.key_side, other.key_side, atol=1e-3)
    with torch.no_grad():
        own = model(torch.tensor([IDS])).logits[0, -1, 5]
    result = dp.attribute(IDS, Tokens(), 5)
    assert float(result.target_logits) == pytest.approx(float(own), abs=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_unmerged_is_as_merged(name):
    model = wrapped(CONFIGS[name])
    check(model, copy.deepcopy(model).merge_and_unload())


def test_half_precision():
    """The output of an adapter is not rounded to the weights' dtype: the error stays that of the model."""
    model = wrapped(CONFIGS["LoRA"])
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        dp = DePass(model.to(dtype))
        for kind in KINDS:
            result = dp.attribute(IDS, kind)
            assert result.completeness_error < tolerance and result.layer_errors.max() < tolerance


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "phi3"])
def test_fused_and_transposed_weights(model_type):
    targets = {
        "gpt2": ["c_attn", "c_proj", "c_fc"],
        "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    }[model_type]
    config = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=model_type == "gpt2")
    model = wrapped(config, model_type, pad_token_id=0)
    check(model, copy.deepcopy(model).merge_and_unload())


def test_several_adapters_and_which_are_active():
    model = wrapped(CONFIGS["LoRA"])
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["v_proj", "down_proj"]))
    randomised(model, seed=2)
    plain = build_model("llama", num_key_value_heads=2, tie_word_embeddings=False)
    model.base_model.set_adapter(["default", "second"])
    check(model, copy.deepcopy(model).merge_and_unload())
    model.set_adapter("second")
    check(model, copy.deepcopy(model).merge_and_unload())
    dp = DePass(model)
    trace = dp.trace(IDS)
    with model.disable_adapter():
        check(model, plain)
        with pytest.raises(ValueError, match="trace: the model's weights have changed"):
            dp.attribute(trace, Tokens())
    assert dp.attribute(trace, Tokens()).completeness_error < 1e-5
    model.merge_adapter()
    with pytest.raises(ValueError, match="trace: the model's weights have changed"):
        dp.attribute(trace, Tokens())
    check(model, copy.deepcopy(model).unload())
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="merged and disabled at once"):
        DePass(model)


def test_modules_that_are_trained_whole():
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["lm_head", "o_proj"])
    model = wrapped(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    check(model, copy.deepcopy(model).merge_and_unload())


def test_adapters_added_to_the_model_itself():
    model = build_model("llama", num_key_value_heads=2)
    model.add_adapter(CONFIGS["LoRA"])
    randomised(model)
    assert DePass(model).attribute(IDS, Heads(1)).completeness_error < 2e-5


def test_a_router_whose_weight_is_tuned():
    """PEFT puts another parameter in its place in every forward pass, and back."""
    config = peft.LoraConfig(r=2, target_parameters=["mlp.gate.weight"])
    model = wrapped(config, "qwen3_moe", num_experts=6, num_experts_per_tok=2, head_dim=8)
    dp = DePass(model)
    trace = dp.trace(IDS)
    assert dp.attribute(trace, Neurons(1)).completeness_error < 2e-5
    check(model, copy.deepcopy(model).merge_and_unload())
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match="trace: the model's weights have changed"):
        dp.attribute(trace, Tokens())


def test_dropout_in_training_mode():
    model = wrapped(CONFIGS["LoRA with dropout"])
    dp = DePass(model)
    model.train()
    with pytest.raises(ValueError, match="training mode with dropout .*lora_dropout"):
        dp.attribute(IDS, Tokens())


def test_the_model_is_handed_back_as_it_came():
    model = wrapped(CONFIGS["DoRA"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    DePass(model).attribute(IDS, Neurons(0))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(getattr(m, "_caches", None) for m in model.modules())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
            "v_proj: Linear changes what it computes otherwise than by adding to its weight; merge the adapter",
        ),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "vectors of its own before the prompt"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "vectors of its own before the prompt"),
        (
            peft.LoraConfig(target_modules=["v_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[1]),
            "holds the adapter 'default' of a kind .ALoraLinearVariant. that is not one weight",
        ),
        (peft.LNTuningConfig(target_modules=["input_layernorm"]), "input_layernorm: .* changes what it computes"),
        (peft.OFTConfig(target_modules=["v_proj"], oft_block_size=4), "v_proj: Linear does not add to its weight"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_is_no_single_weight_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        DePass(wrapped(config))


def test_an_up_projection_that_is_no_single_weight():
    """Most rules do not read it."""
    dp = DePass(wrapped(peft.IA3Config(target_modules=["up_proj"], feedforward_modules=[])))
    assert dp.attribute(IDS, Tokens()).completeness_error < 2e-5
    with pytest.raises(
        ValueError, match="'half' needs the up projection .* model.layers.0.mlp.up_proj: Linear changes"
    ):
        dp.adapter.check_linear_rule("half")
