"""Models in 8 and 4 bit, as the libraries make them: their weights are read through dequantisation."""

import pytest
import torch

from depass_fast import DePass, Heads, Modules, Neurons, Tokens
from depass_fast.adapters.stored import stored_weight
from depass_fast.trace.activations import check_activations
from tests.support.family_models import build_model
from tests.support.models import random_ids

IDS = random_ids(7)
KINDS = (Tokens(), Heads(1), Modules(0), Neurons(1))


def build():
    return build_model("llama", hidden_size=64, intermediate_size=128, num_key_value_heads=2)


def replace_linears(model, make):
    """Every projection of every layer, made anew by ``make``; the unembedding stays, as it does in real ones."""
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(parent, name, make(linear))
    return model.eval()


def bitsandbytes_4bit(kind="nf4", dtype=torch.float32):
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear):
        new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, compute_dtype=dtype, quant_type=kind)
        new.load_state_dict(linear.state_dict())
        return new.to("cpu")

    return replace_linears(build().to(dtype), make)


def bitsandbytes_8bit():
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear):
        new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, False, has_fp16_weights=False)
        new.load_state_dict(linear.state_dict())
        return new.to("cpu")

    return replace_linears(build(), make)


def torchao(name="Int8WeightOnlyConfig"):
    quantization = pytest.importorskip("torchao.quantization")
    model = build()
    config = getattr(quantization, name)()
    quantization.quantize_(model, config, filter_fn=lambda m, path: "proj" in path and isinstance(m, torch.nn.Linear))
    return model


def quanto(weights="qint8", frozen=True):
    package = pytest.importorskip("optimum.quanto")
    model = build()
    package.quantize(model, weights=getattr(package, weights), exclude="lm_head")
    if frozen:
        package.freeze(model)
    return model


MODELS = {
    "bitsandbytes, nf4": bitsandbytes_4bit,
    "bitsandbytes, fp4": lambda: bitsandbytes_4bit("fp4"),
    "bitsandbytes, nf4 in bfloat16": lambda: bitsandbytes_4bit(dtype=torch.bfloat16),
    "bitsandbytes, int8": bitsandbytes_8bit,
    "torchao, int8": torchao,
    "torchao, float8": lambda: torchao("Float8WeightOnlyConfig"),
    "quanto, int8": quanto,
    "quanto, int4": lambda: quanto("qint4"),
    "quanto, not frozen": lambda: quanto(frozen=False),
}
# of a layer's completeness; bitsandbytes rounds activations to 8 bit, or computes 4 bit in bfloat16 on some processors
TOLERANCE = {"bitsandbytes, int8": 5e-2, "bitsandbytes": 2e-2}


def tolerance(name: str) -> float:
    return next((value for start, value in TOLERANCE.items() if name.startswith(start)), 2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_quantised_weights_are_read(name):
    model = MODELS[name]()
    dp, plain = DePass(model), build()
    for index in range(3):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            home = "self_attn" if part[0] in "qkvo" and part != "up_proj" else "mlp"
            own, linear = (m.model.layers[index].get_submodule(f"{home}.{part}") for m in (model, plain))
            with torch.no_grad():
                computed = own(torch.eye(linear.in_features, dtype=dp.adapter.dtype)).T
                read = stored_weight(own)
                assert (read - computed).norm() < max(tolerance(name), 1e-6) * computed.norm()
                linear.weight.copy_(computed)
    dp.adapter.check_linear_rule("half")
    check_activations(dp.adapter, dp.trace(IDS))
    for kind in KINDS:
        result = dp.attribute(IDS, kind)
        assert result.completeness_error < tolerance(name), kind
        assert result.layer_errors.max() < tolerance(name), kind
        if not name.startswith("bitsandbytes"):
            expected = DePass(plain).attribute(IDS, kind)
            assert torch.allclose(result.scores, expected.scores, atol=1e-4 * float(expected.scores.abs().max()))


@pytest.mark.parametrize("make", [bitsandbytes_4bit, bitsandbytes_8bit])
def test_lora_on_quantised_weights(make):
    peft = pytest.importorskip("peft")
    model = make()
    model.config.quantization_config = None
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["v_proj", "o_proj", "gate_proj", "down_proj"])
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    dp = DePass(model.eval())
    for kind in KINDS:
        assert dp.attribute(IDS, kind).completeness_error < 5e-2
    with model.disable_adapter():
        assert DePass(model).attribute(IDS, Tokens(), 5).completeness_error < 5e-2


def test_rounded_activations_show_in_the_completeness():
    """8-bit activations are the model's own rounding: weights alone do not tell what it computed."""
    model = torchao("Int8DynamicActivationInt8WeightConfig")
    result = DePass(model).attribute(IDS, Tokens())
    assert 1e-4 < result.completeness_error < 0.1
    heads = DePass(model).attribute(IDS, Heads(2))
    assert heads.completeness_error < 0.1
