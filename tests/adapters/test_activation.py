"""The activation of an MLP and its up projection, where the families differ."""

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from depass_fast import DePass, Tokens
from depass_fast.adapters import Activation, without_biases
from tests.support.family_models import available, build_model, build_variant
from tests.support.forks import fork
from tests.support.models import random_ids

IDS = random_ids(8)


def adapted(name):
    if not available(name):
        pytest.skip("the installed transformers does not have it")
    return DePass(build_variant(name)).adapter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_limits_and_offset(dtype):
    gate, up = (torch.tensor(x, dtype=dtype) for x in ([-9.0, 2.0, 9.0], [-9.0, 0.5, 9.0]))
    activation = Activation(torch.square, gate_limit=3.0, up_limit=2.0, up_offset=1.0)
    assert torch.equal(activation(gate, up), torch.tensor([-81.0, 6.0, 27.0], dtype=dtype))
    assert torch.equal(activation(gate), torch.tensor([81.0, 4.0, 9.0], dtype=dtype))
    assert torch.equal(Activation(torch.square)(gate, up), torch.square(gate) * up)


@torch.no_grad()
def test_gpt_oss_clamps_and_interleaves():
    adapter = adapted("gpt_oss")
    experts, mlps, limit = adapter.model.model.layers[1].mlp.experts, adapter.mlps(1), 0.7
    activation = mlps[0].activation
    assert (activation.gate_limit, activation.up_limit, activation.up_offset) == (limit, limit, 1.0)
    assert activation is mlps[-1].activation is adapter.mlps(0)[0].activation
    gate, up = torch.tensor([-3.0, 0.3, 5.0, 5.0]), torch.tensor([5.0, 0.2, -5.0, 0.1])
    g, u = torch.tensor([-3.0, 0.3, limit, limit]), torch.tensor([limit, 0.2, -limit, 0.1])
    assert torch.allclose(activation(gate, up), (u + 1) * g * torch.sigmoid(1.702 * g))
    for index, mlp in enumerate(mlps):
        assert torch.equal(mlp.w_gate, experts.gate_up_proj[index, :, 0::2].T)
        assert torch.equal(mlp.w_up, experts.gate_up_proj[index, :, 1::2].T)
        assert torch.equal(mlp.up_constant(torch.float32), experts.gate_up_proj_bias[index, 1::2])
    assert without_biases(adapter).mlps(1)[0].up_constant(torch.float32) is None


@torch.no_grad()
def test_xielu_of_apertus():
    adapter, x = adapted("apertus"), torch.linspace(-4, 4, 33, dtype=torch.float64)
    mlp = adapter.mlps(1)[0]
    own = mlp.activation.curve
    assert mlp.up is None and own is adapter.block(1).mlp.act_fn
    above, below = nn.functional.softplus(own.alpha_p.double()), 0.5 + nn.functional.softplus(own.alpha_n.double())
    expected = torch.where(x > 0, above * x**2, (torch.expm1(x) - x) * below) + 0.5 * x
    assert torch.allclose(mlp.activation(x), expected, atol=1e-5)  # by its own code, xIELU(0) is not quite 0


@pytest.mark.parametrize("name", ["phi3", "glm", "glm4", "granitemoehybrid"])
def test_fused_projections_hold_the_gate_first(name):
    mlp = adapted(name).mlps(0)[0]
    assert mlp.gate.module is mlp.up.module and mlp.up.is_fused
    assert torch.equal(torch.cat([mlp.w_gate, mlp.w_up]), mlp.up.module.weight)


def test_biases_of_the_up_projection_and_of_the_norm():
    adapter = adapted("llama: biases")
    mlp = adapter.mlps(0)[0]
    assert torch.equal(mlp.up_constant(torch.float64), adapter.block(0).mlp.up_proj.bias.double())
    bare = without_biases(adapter).mlps(0)[0]
    assert bare.up_constant(torch.float64) is None and not bare.has_bias and bare.activation is not None
    norm = adapted("stablelm").mlps(0)[0]
    assert torch.allclose(norm.up_constant(torch.float32), norm.w_up @ norm.norm.bias)
    assert adapted("gpt2").mlps(0)[0].up_constant(torch.float32) is None


def test_a_bias_of_the_up_projection_alone_counts():
    model = fork()
    up = model.model.layers[0].mlp.up_proj
    up.bias = nn.Parameter(torch.ones(up.out_features))
    layers = [DePass(model).adapter.layer(index) for index in (0, 1)]
    assert [layer.has_mlp_bias for layer in layers] == [True, False]


def test_the_activation_is_read_as_it_is_now():
    model, tanh, compiled = fork(), nn.Tanh(), nn.Module()
    compiled._orig_mod = tanh  # as torch.compile wraps it
    dp, mlp = DePass(model), model.model.layers[1].mlp
    for other, expected in ((relu := nn.ReLU(), relu), (compiled, tanh), (silu, silu)):
        del mlp.act_fn  # torch puts no function in a module's place
        mlp.act_fn = other
        assert dp.adapter.mlps(1)[0].activation.curve is expected


@pytest.mark.parametrize("part", ["act_fn", "up_proj"])
def test_a_fork_that_keeps_them_elsewhere(part):
    """Only the rules that need them refuse it."""
    model = fork()
    mlp = model.model.layers[1].mlp
    mlp.renamed = getattr(mlp, part)
    delattr(mlp, part)
    own = {"act_fn": nn.SiLU(), "up_proj": getattr(mlp, "up_proj", None), part: mlp.renamed}
    mlp.forward = lambda x: mlp.down_proj(own["act_fn"](mlp.gate_proj(x)) * own["up_proj"](x))
    dp = DePass(model)
    assert dp.attribute(IDS, Tokens()).completeness_error <= 1e-5
    with pytest.raises(ValueError, match=f"allocation: 'shapley' needs .* every MLP; model.layers.1.mlp.{part}: the"):
        dp.adapter.check_linear_rule("shapley")


def test_an_up_projection_that_cannot_be_read():
    model = fork()
    dp = DePass(model)
    up = model.model.layers[2].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert up in dp.adapter.weighty(2, linear_rule=True) and up not in dp.adapter.weighty(2)
    with pytest.raises(ValueError, match="'half' needs .* model.layers.2.mlp.up_proj: its weight is quantised"):
        dp.adapter.check_linear_rule("half")


def test_every_expert_has_both():
    adapter = DePass(build_model("mixtral", num_key_value_heads=2, num_local_experts=4)).adapter
    adapter.check_linear_rule("half")
    for mlp in adapter.mlps(0):
        assert mlp.up is not None and mlp.w_up.shape == mlp.w_gate.shape
        assert torch.equal(mlp.activation(torch.ones(2), torch.ones(2)), silu(torch.ones(2)))
