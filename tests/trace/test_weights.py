"""A trace of other weights is refused, however they were changed, and what no check sees shows in the completeness."""

import copy
import math
import warnings

import pytest
import torch

from depass_fast import ApproximationWarning, CompletenessWarning, DePass, Heads, Neurons, Tokens
from depass_fast.allocation import softmax
from depass_fast.request import take_trace
from depass_fast.trace.weights import are_the_same, sample_weights
from tests.support.family_models import build_model
from tests.support.models import build, random_ids

IDS = random_ids(8)


@pytest.fixture
def model():
    return copy.deepcopy(build_model("llama", num_key_value_heads=2))


def one_percent(model):
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.01)


def held_trace(dp):
    """A trace without a sample of the weights, as if the change were one that no sample shows."""
    return take_trace(dp.adapter, [torch.tensor(IDS)], False)


def test_a_change_that_torch_does_not_count_is_seen(model):
    dp = DePass(model)
    trace = dp.trace(IDS)
    assert dp.attribute(trace, Tokens(), 3).warnings is None
    versions = [p._version for p in model.parameters()]
    one_percent(model)
    assert [p._version for p in model.parameters()] == versions
    for call in (lambda: dp.attribute(trace, Tokens(), 3), lambda: dp.decompose(trace, Heads(0))):
        with pytest.raises(ValueError, match="weights have changed"):
            call()
    assert dp.attribute(dp.trace(IDS), Tokens(), 3).warnings is None


@pytest.mark.parametrize("shape", [(480, 320), (4096, 64), (64, 4096), (1, 9), (9, 1), (3, 80, 40), (1100,), ()])
def test_the_sample_lies_in_many_rows_and_columns(shape):
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.arange(math.prod(shape), dtype=torch.float32).view(shape))
    (sample,) = sample_weights(layer)
    elements = sample.view(torch.float32).long()
    assert min(layer.weight.numel(), 512) <= len(elements) < 1536
    columns = shape[-1] if shape else 1
    for count, found in ((columns, elements % columns), (math.prod(shape) // columns, elements // columns)):
        assert len(found.unique()) >= min(count, 256)


@pytest.mark.parametrize("first", [0, 700, 4088])
def test_a_change_of_a_few_rows_is_seen(first):
    layer = torch.nn.Linear(96, 4096, bias=False)
    before = sample_weights(layer)
    layer.weight.data[first : first + 8] += 1.0  # 1/512 of them
    assert not are_the_same(before, sample_weights(layer))


def test_the_sample_is_of_bytes():
    layer = torch.nn.Linear(4, 4).half()
    before = sample_weights(layer)
    assert are_the_same(before, sample_weights(layer))
    layer.weight.data[0, 0] = torch.nan
    assert not are_the_same(before, sample_weights(layer))
    assert are_the_same(sample_weights(layer), sample_weights(layer))  # NaN is equal to itself


@pytest.mark.parametrize("kind", [Tokens(), Heads(0), Heads(layers="all")])
def test_an_error_beyond_the_dtypes_carries_a_warning(model, kind):
    dp = DePass(model)
    trace = held_trace(dp)
    one_percent(model)
    with pytest.warns(CompletenessWarning, match="miss the hidden states by .* float32 explains .* trace the prompt"):
        result = dp.attribute(trace, kind, 3)
    assert len(result.warnings) == 1 and "trace the prompt again" in result.warnings[0]
    with pytest.warns(CompletenessWarning):
        dp.decompose(trace, Heads(0))
    with pytest.warns(CompletenessWarning):
        assert dp.partition(trace, Heads(0)).completeness_error > 1e-4


def test_states_that_are_carried_by_other_weights_warn(model):
    dp = DePass(model)
    trace = held_trace(dp)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompletenessWarning)
        halfway = dp.carry(trace, dp.start(trace, Heads(0)), 1)
        doubled = dp.start(trace, Heads(0))
        doubled.rows *= 2
        assert dp.carry(trace, doubled).completeness_error > 0.1  # they miss the hidden states from the start
    one_percent(model)
    with pytest.warns(CompletenessWarning, match="miss the hidden states by .* trace the prompt again"):
        assert dp.carry(trace, halfway).completeness_error > 1e-4


@pytest.mark.parametrize("allocation", ["softmax", "taylor"])
def test_a_sweep_through_other_weights_carries_a_warning(model, allocation):
    dp, how = DePass(model, allocation=allocation), {"method": "adjoint"}
    trace = held_trace(dp)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ApproximationWarning)
        for kind in (Neurons(0), Neurons(layers="all")):
            assert not dp.attribute(trace, kind, 3, **how).warnings
    one_percent(model)
    sweep, way_back = (ApproximationWarning, "0.* take another"), (CompletenessWarning, ".* trace the prompt again")
    category, match = sweep if allocation == "softmax" else way_back
    with pytest.warns(category, match=f"miss the logit by {match}"):
        result = dp.attribute(trace, Neurons(0), 3, **how)
    assert 1e-4 < result.completeness_error < 1e-2 and result.warnings


def test_a_readout_of_other_weights_carries_a_warning(model):
    dp = DePass(model)
    trace = held_trace(dp)
    model.model.norm.weight.data.mul_(1.01)
    with pytest.warns(CompletenessWarning, match="miss the logit"):
        assert dp.attribute(trace, Heads(1), 3).warnings


def test_a_rule_that_loses_shares_carries_a_warning():
    with pytest.warns(CompletenessWarning, match="your own rule"):
        build("llama-gqa").attribute(IDS, Tokens(), 3, allocation=lambda g, _: 0.5 * softmax(g, 1.0))


@pytest.mark.parametrize("options", [{}, {"state_dtype": "bfloat16"}, {"compute_dtype": "float16"}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_rounding_is_no_reason_to_warn(name, dtype, options):
    dp = DePass(copy.deepcopy(build(name).model).to(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompletenessWarning)
        for kind in (Tokens(), Heads(0), Heads(layers="all")):
            assert dp.attribute([IDS, IDS[3:]], kind, [None, 5], **options)[0].warnings is None
        dp.decompose(IDS, Tokens(), **options)
