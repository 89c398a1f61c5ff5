"""Weights are read from modules in 8 and 4 bit, which are known by their attributes, and from wrapped modules.

The real libraries are in tests/interop/test_quantised.py and tests/interop/test_peft.py.
"""

import weakref

import pytest
import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from depass_fast import DePass, Heads, Neurons, Tokens
from depass_fast.options import Adjoint
from depass_fast.trace.activations import check_activations
from tests.support.family_models import build_model
from tests.support.models import build, random_ids

IDS = random_ids(6)


class StandIn(nn.Module):
    """A linear module whose weight is stored as something else; ``factor`` is what it computes too much."""

    def __init__(self, linear: nn.Linear, factor: float = 1.0) -> None:
        super().__init__()
        self.numbers, self.factor = [linear.weight.detach()], factor  # in a list: no parameter
        self.out_features, self.in_features = linear.weight.shape
        self.bias = None
        self.register_buffer("packed", torch.zeros(1))

    def forward(self, x):
        return nn.functional.linear(x, self.numbers[0]) * self.factor


class Hqq(StandIn):
    W_q = "packed"

    def dequantize(self):
        return self.numbers[0]


class Gptq(StandIn):
    qweight = "packed"

    def dequantize_weight(self):
        return self.numbers[0].T


class Compressed(StandIn):
    class Compressor:
        def decompress_module(self, module):
            return module.numbers[0]

    compressor = Compressor()


class Awq(StandIn):
    qweight = "packed"


def replaced(kind, **arguments):
    model = build_model("llama", num_key_value_heads=2)
    for layer in model.model.layers:
        for home, names in (
            (layer.self_attn, ("v_proj", "o_proj")),
            (layer.mlp, ("gate_proj", "up_proj", "down_proj")),
        ):
            for name in names:
                setattr(home, name, kind(getattr(home, name), **arguments))
    return model


@pytest.mark.parametrize("kind", [Hqq, Gptq, Compressed])
def test_what_can_be_dequantised_is_read(kind):
    dp = DePass(replaced(kind))
    for component in (Tokens(), Heads(1)):
        expected = build("llama-gqa").attribute(IDS, component)
        result = dp.attribute(IDS, component)
        assert torch.allclose(result.scores, expected.scores, atol=1e-5)
        assert result.completeness_error < 1e-5


def test_it_is_dequantised_once_per_use_of_a_layer():
    count = []

    class Counted(Hqq):
        def dequantize(self):
            count.append(self)
            return super().dequantize()

    dp = DePass(replaced(Counted))
    assert len(count) == 1  # one module, tried
    trace = dp.trace(IDS)
    assert len(count) == 13  # the first time, all are compared with what they compute
    dp.trace(IDS)
    assert len(count) == 13
    count.clear()
    dp.attribute(trace, Tokens())
    assert len(count) == 12 and len(set(map(id, count))) == 12  # V, O, gate and down of three layers


def test_a_sweep_holds_the_weights_of_one_layer_at_a_time():
    made, most = [], []

    class Fresh(Hqq):
        def dequantize(self):
            weight = super().dequantize().clone()
            made.append(weakref.ref(weight))
            most.append(sum(ref() is not None for ref in made))
            return weight

    dp = DePass(replaced(Fresh))
    trace = dp.trace(IDS)
    made.clear(), most.clear()
    dp.attribute(trace, Neurons(0), method=Adjoint(refine=4))
    assert len(made) > 24 and max(most) <= 8  # V, O, gate and down: of a layer, and of the one before it


def test_the_check_of_activations_holds_one_up_projection_at_a_time():
    made, most = [], []

    class Fresh(Hqq):
        def dequantize(self):
            weight = super().dequantize().clone()
            made.append(weakref.ref(weight))
            most.append(sum(ref() is not None for ref in made))
            return weight

    dp = DePass(replaced(Fresh))
    trace = dp.trace(IDS)
    made.clear(), most.clear()
    check_activations(dp.adapter, trace)
    assert len(made) == 3 and max(most) <= 2  # one, and that of the layer before it


def test_a_weight_that_is_not_what_the_module_computes_with():
    with pytest.raises(
        ValueError, match=r"self_attn.v_proj: what this Hqq computes is not what its weight says .*10.0%"
    ):
        DePass(replaced(Hqq, factor=1.1))


def test_what_cannot_be_dequantised_is_refused():
    with pytest.raises(ValueError, match=r"layers.0.self_attn.v_proj: its weight is quantised .* cannot be read"):
        DePass(replaced(Awq))


def test_float8_without_its_scale_is_refused():
    model = build_model("llama", num_key_value_heads=2)
    projection = model.model.layers[0].mlp.down_proj
    projection.weight = nn.Parameter(projection.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"mlp.down_proj: its weight is quantised .torch.float8_e4m3fn."):
        DePass(model)


def test_experts_are_checked_too():
    model = build_model("mixtral", num_key_value_heads=2, num_local_experts=4)
    experts = getattr(model.model.layers[0], "mlp", None) or model.model.layers[0].block_sparse_moe
    if isinstance(experts.experts, nn.ModuleList):
        experts.experts[2].w3.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    else:
        experts.experts.down_proj = nn.Parameter(torch.zeros(4, 4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="experts.*: its weight is quantised .torch.uint8."):
        DePass(model)


def latent():
    return build_model("youtu", num_key_value_heads=4, kv_lora_rank=10, qk_nope_head_dim=6, v_head_dim=8)


def test_the_second_half_of_a_latent_may_round_as_quantised_weights_do():
    class Rounding(Hqq):
        def forward(self, x):
            return super().forward(x.bfloat16().float())

    if "youtu" not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    model = latent()
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = Rounding(layer.self_attn.kv_b_proj)
    assert DePass(model).attribute(IDS, Tokens()).completeness_error < 0.01


def test_a_latent_with_a_bias_is_refused():
    if "youtu" not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    model = latent()
    model.model.layers[1].self_attn.kv_b_proj.bias = nn.Parameter(torch.ones(4 * 14))
    with pytest.raises(ValueError, match="through a latent with a bias"):
        DePass(model)
