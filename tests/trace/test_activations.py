"""Recorded activations are those of the up projection and the function that are read, or a linear rule is refused."""

import functools

import pytest
import torch
from torch import nn

from depass_fast import DePass, Tokens
from depass_fast.trace import activations
from depass_fast.trace.activations import check_activations
from depass_fast.trace.first import first_positions
from tests.support.family_models import available, build_model, build_variant
from tests.support.forks import fork
from tests.support.models import random_ids

IDS = random_ids(8)


@pytest.fixture
def compared(monkeypatch):
    """The number of comparisons made so far."""
    made, compare = [], activations._compare

    def counted(*given):
        made.append(given)
        compare(*given)

    monkeypatch.setattr(activations, "_compare", counted)
    return made


def computes_with(function, layer):
    mlp = layer.mlp
    mlp.forward = lambda x: mlp.down_proj(function(mlp.gate_proj(x)) * mlp.up_proj(x))


def scales_the_up_projection(layer):
    mlp = layer.mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * (mlp.up_proj(x) + 0.1))


CHANGES = {
    "another function": functools.partial(computes_with, nn.ReLU()),
    "nearly the same": functools.partial(computes_with, lambda x: x * torch.sigmoid(1.2 * x)),
    "an offset": scales_the_up_projection,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("change", CHANGES)
def test_a_fork_that_computes_with_something_else(change, dtype):
    model = fork().to(dtype)
    CHANGES[change](model.model.layers[1])
    dp = DePass(model)
    trace = dp.trace(IDS)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(
            RuntimeError, match=r"layer 1: \S+\.1\.mlp.down_proj reads .* times \S+\.1\.mlp.up_proj .* take"
        ):
            check_activations(dp.adapter, trace)
    assert dp.attribute(trace, Tokens()).completeness_error < 0.02  # the other rules take what was recorded


def test_an_ungated_fork_and_an_expert_are_named():
    model = build_variant("gpt2")
    mlp = model.transformer.h[0].mlp
    mlp.forward = lambda x: mlp.c_proj(torch.relu(mlp.c_fc(x)))
    dp = DePass(model)
    with pytest.raises(
        RuntimeError, match=r"layer 0: transformer.h.0.mlp.c_proj reads something .* of transformer.h.0.mlp.c_fc \("
    ):
        check_activations(dp.adapter, dp.trace(IDS))
    dp = DePass(build_model("mixtral", num_key_value_heads=2, num_local_experts=4))
    trace = dp.trace(IDS)
    trace.layers[2].mlps[0].act *= 1.01
    with pytest.raises(RuntimeError, match="layer 2: the recorded activations of expert E. of model.layers.2"):
        check_activations(dp.adapter, trace)


def test_an_activation_that_was_swapped_after_loading(compared):
    model = fork()
    dp = DePass(model)
    before = dp.trace(IDS)
    check_activations(dp.adapter, before)
    for other in (nn.ReLU(), torch.tanh, nn.functional.silu):
        del model.model.layers[1].mlp.act_fn  # torch puts no function in a module's place
        model.model.layers[1].mlp.act_fn = other
        count = len(compared)
        check_activations(dp.adapter, dp.trace(IDS))
        assert len(compared) == count + 3
    model.model.layers[1].mlp.act_fn = torch.relu
    with pytest.raises(RuntimeError, match="layer 1"):
        check_activations(dp.adapter, before)


@pytest.mark.parametrize("name", ["llama: GQA", "gpt_oss", "bloom", "ctrl", "openai-gpt"])
def test_a_model_is_compared_once(name, compared):
    if not available(name):
        pytest.skip("the installed transformers does not have it")
    dp = DePass(build_variant(name))
    check_activations(dp.adapter, dp.trace(IDS))
    count = len(compared)
    check_activations(dp.adapter, dp.trace(random_ids(20)))
    assert len(compared) == count > 0


def test_routers_weights_of_the_first_positions():
    """The shared expert's, too."""
    for name in ("qwen2_moe", "granitemoeshared"):
        dp = DePass(build_variant(name))
        cut = first_positions(dp.trace([IDS, random_ids(5, seed=1)]), [4, 2])
        for layer in cut.layers:
            for part in (part for part in layer.mlps if dp.adapter.is_mixture(0)):
                rows = len(part.gate)
                assert part.router_weight is None or part.router_weight.shape == (rows,)
        assert any(part.router_weight is not None and part.positions is None for part in cut.layers[0].mlps)
        check_activations(dp.adapter, cut)


def test_a_trace_without_routers_weights_is_as_it_was():
    """Those that were saved before they were recorded."""
    dp = DePass(build_model("mixtral", num_key_value_heads=2, num_local_experts=4))
    trace = dp.trace(IDS)
    expected = dp.attribute(trace, Tokens()).scores
    for layer in trace.layers:
        for part in layer.mlps:
            part.router_weight = None
            assert part.constant(dp.adapter.mlps(0)[part.part], slice(0, 8), torch.float32) is None
    assert torch.equal(dp.attribute(trace, Tokens()).scores, expected)
