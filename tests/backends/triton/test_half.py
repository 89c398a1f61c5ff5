"""Products in float16 with a scale per row: nearer than bfloat16, at any size of component, and never out of range."""

import itertools
import math
import statistics

import pytest
import torch

from depass_fast import Custom, DePass, Heads, Neurons, Tokens
from depass_fast.allocation import Allocation
from depass_fast.backends.reference import ReferenceBackend
from depass_fast.kernels.rows import ROW_TOP
from depass_fast.options import Options
from depass_fast.state.state import ComponentState
from tests.support.family_models import build_model
from tests.support.models import random_ids

pytest.importorskip("triton")

from depass_fast.backends.triton import half
from depass_fast.backends.triton.backend import TritonBackend

OPTIONS = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}


def model(name="llama", seed=0, **more):
    return build_model(name, seed=seed, **(OPTIONS | more)).to(torch.bfloat16)


def error(found, exact):
    return float((found - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("name", ["qwen2", pytest.param("gemma2", marks=pytest.mark.thorough)])
def test_scores_are_several_times_nearer_than_in_bfloat16(name):
    errors = {"bfloat16": [], "float16": []}
    for kind, seed in itertools.product((Tokens(), Heads(0), Neurons(0)), range(2)):
        dp = DePass(model(name, seed))
        trace = dp.trace(random_ids(12, seed=seed))
        exact = dp.attribute(trace, kind, 3, backend="reference", state_dtype="float64").scores
        for compute, found in errors.items():
            scores = dp.attribute(trace, kind, 3, backend="triton", compute_dtype=compute).scores
            found.append(float((scores - exact).norm() / exact.norm()))
    assert 5 * statistics.median(errors["float16"]) <= statistics.median(errors["bfloat16"]), errors


def increments(dp, trace, backend, state, dtype=torch.float32):
    layer, record = dp.adapter.layer(1), trace.layers[1]

    def fresh():
        return ComponentState(state.rows.to(dtype, copy=True), state.layout, 1)

    yield backend.aggregate_ov(fresh(), layer.attention, record.attention).rows.double() - state.rows
    yield backend.allocate_mlp(fresh(), layer.mlps[0], record.mlps[0], Allocation()).rows.double() - state.rows


def assert_each_row_is_near(dp, trace, state, accuracy):
    """The attention's increment of every row is right, relative to its own size."""
    backend = TritonBackend(torch.float16)
    backend.begin(dp.adapter, trace, 1, 2)
    found = next(increments(dp, trace, backend, state))
    exact = next(increments(dp, trace, ReferenceBackend(), state, torch.float64))
    rounding = 2.0**-23 * state.rows.norm(dim=1)  # float32 holds the sum of a row and its increment
    assert ((found - exact).norm(dim=1) <= accuracy * exact.norm(dim=1) + rounding).all()


@torch.no_grad()
@pytest.mark.parametrize("power", [-40, -10, 0, 10])
def test_a_component_of_any_size_is_as_precise_as_any_other(power):
    dp = DePass(model())
    trace = dp.trace(random_ids(9))
    state = dp.start(trace, Heads(0))
    state.rows[1::5] *= 2.0**power
    assert_each_row_is_near(dp, trace, state, 2e-3)


@torch.no_grad()
@pytest.mark.parametrize(("heads", "kv"), [(4, 2), (3, 1), (14, 2)])
def test_heads_of_a_group_in_several_tiles_are_right(heads, kv):
    """Rows that double every fourth position, and more positions than a tile of keys has."""
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": 128}
    dp = DePass(model(hidden_size=8 * heads, **shape))
    trace = dp.trace(random_ids(80))
    state = dp.start(trace, Heads(0))
    state.rows[1:] *= (2.0 ** (torch.arange(len(state.rows) - 1) // (4 * (heads + 1)) - 10))[:, None]
    assert_each_row_is_near(dp, trace, state, 2e-2)


@torch.no_grad()
def test_a_layer_whose_weights_are_too_large_computes_in_bfloat16():
    dp = DePass(model())
    trace = dp.trace(random_ids(7))
    assert set(half.ranges(dp.adapter, trace, 0, 2)) == {(0, None), (1, None), (0, 0), (1, 0)}
    dp.model.model.layers[1].mlp.gate_proj.weight[3] *= 2.0**14
    dp.model.model.layers[0].self_attn.v_proj.weight[:] *= 2.0**14
    trace = dp.trace(random_ids(7))  # the sizes of changed weights are measured again
    assert set(half.ranges(dp.adapter, trace, 0, 2)) == {(1, None), (0, 0)}
    for kind in (Tokens(), Neurons(0)):
        exact = dp.attribute(trace, kind, 3, backend="reference", state_dtype="float64").scores
        found = dp.attribute(trace, kind, 3, backend="triton", compute_dtype="float16").scores
        assert error(found, exact) <= 0.1


@torch.no_grad()
@pytest.mark.parametrize("size", [2.0**-6, 1.0, 2.0**5])
def test_no_product_leaves_the_range_of_float16(size):
    """The worst rows that there are: parallel to a row of the weight, and all of their elements alike."""
    dp = DePass(model())
    for layer in dp.model.model.layers:
        for weight in (layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight, layer.mlp.gate_proj.weight):
            weight.copy_(weight.sign() * size * 0.02)
    trace = dp.trace(random_ids(5))
    for (index, part), found in half.ranges(dp.adapter, trace, 0, 2).items():
        layer = dp.adapter.layer(index)
        reads = layer.attention.w_v if part is None else layer.mlps[part].w_gate
        worst = reads.double().sign() * 2.0 ** (ROW_TOP + 1)
        values = (worst @ reads.double().T).abs().max()
        assert values <= half.LARGEST
        if part is None:
            mixed = values * 2.0**-found.shift * math.sqrt(layer.attention.o.shape[1])
            assert mixed * layer.attention.w_o.double().norm(dim=1).max() <= 1.01 * half.LARGEST
        else:
            assert 2**13 < found.factor * trace.layers[index].mlps[part].act.abs().max() <= 2**15


@torch.no_grad()
@pytest.mark.parametrize("power", [-60, 0, 40, 100])
def test_shares_of_activations_of_any_size_are_in_range(power):
    dp = DePass(model())
    trace = dp.trace(random_ids(5))
    act = trace.layers[1].mlps[0].act
    act *= 2.0**power
    factor = half.ranges(dp.adapter, trace, 1, 2)[1, 0].factor
    assert factor * act.double().abs().max() <= 2**15 and 1 / factor <= torch.finfo(torch.float32).max


def test_small_shares_of_large_activations_survive():
    """Components of 1e-7 of the hidden state, on a position whose activations are a thousand times the usual."""
    dp = DePass(model())
    ids = random_ids(6)
    trace = dp.trace(ids)
    tensor = torch.randn(6, 3, 64, generator=torch.Generator().manual_seed(0)) * 1e-7
    exact = dp.attribute(trace, Custom(0, tensor), 3, backend="reference", state_dtype="float64").scores
    found = dp.attribute(trace, Custom(0, tensor), 3, backend="triton", compute_dtype="float16").scores
    assert error(found[:3], exact[:3]) <= 5e-3


def test_float16_is_the_default_for_a_bfloat16_model_on_a_gpu_alone():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert Options().takes_float16(torch.bfloat16, gpu)
    assert not Options().takes_float16(torch.bfloat16, cpu) and not Options().takes_float16(torch.float32, gpu)
    assert not Options(compute_dtype="bfloat16").takes_float16(torch.bfloat16, gpu)
