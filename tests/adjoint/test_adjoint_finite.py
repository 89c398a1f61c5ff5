"""The adjoint sweep stays finite whatever the model, the temperature, the dtype or the prompt."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depass_fast import Custom, DePass, Neurons
from depass_fast.adjoint.approximation import Approximation
from depass_fast.adjoint.forward import mean_field
from depass_fast.adjoint.stack import LayerStack
from depass_fast.adjoint.starts import make_start
from depass_fast.options import Adjoint
from depass_fast.results.estimate import ApproximationWarning
from tests.support.adjoint import assert_close, explicit_rows, no_nan
from tests.support.components import custom
from tests.support.extreme import extreme
from tests.support.family_models import build_model
from tests.support.models import build, random_ids

pytestmark = pytest.mark.filterwarnings("ignore::depass_fast.ApproximationWarning")


@pytest.mark.parametrize("change", ["no gates", "half the gates", "half the activations", "no activations"])
def test_dead_neurons_are_those_of_an_exact_run(change):
    """A neuron that nobody drives goes to `rest` in both."""
    (dp, options), ids = extreme(change), random_ids(6, seed=12)
    for kind in (Neurons(0), custom(dp, ids, layer=0, scale=0.02)):
        exact = dp.attribute(ids, kind, 5, **options).scores
        found = dp.attribute(ids, kind, 5, method=Adjoint(refine=0, sample=0), **options).scores
        assert_close(found, exact, 0.06)


def test_complete_components_without_rest_or_bias():
    dp, ids = build("llama-gqa"), random_ids(6)
    trace = dp.trace(ids)
    for change, count in (("", 30), ("half the gates", 30), ("", 1)):
        dp = extreme(change)[0] if change else dp
        trace = dp.trace(ids)
        kind = Custom(1, trace.resid(1)[:, None].expand(-1, count, -1).detach() / count)
        exact = dp.attribute(trace, kind, 5)
        found = dp.attribute(trace, kind, 5, method=Adjoint(sample=0, refine=0))
        assert exact.labels == found.labels and "rest" not in found.labels
        assert_close(found.scores, exact.scores, 1e-3)
        assert dp.attribute(trace, kind, 5, method="adjoint").scores.isfinite().all()


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("change", ["weights", "temperature", "no activations", "half the activations", "no gates"])
def test_nothing_is_ever_nan_or_inf(change, length):
    (dp, options), ids = extreme(change), random_ids(length, seed=10)
    for kind in (Neurons(layers="all"), custom(dp, ids, layer=0, scale=10.0)):
        found = dp.attribute(ids, kind, [5, (2, 3)], method=Adjoint(refine=8), **options)
        rough = dp.attribute(ids, kind, 5, method=Adjoint(refine=0, sample=0), **options)
        for one in [*found, *rough] if kind.is_layered else [found, rough]:
            assert one.scores.isfinite().all() and math.isfinite(one.completeness_error)
            assert no_nan(found.estimate)


@pytest.mark.parametrize("temperature", [1e-22, 1e-30, 1e-300])
@pytest.mark.parametrize("neurons", [129, 130, 300])
def test_any_temperature_however_small(neurons, temperature):
    """Gates in units of it are beyond what float32 can square, or hold; exact runs come to a maximum there."""
    dp, ids = DePass(build_model("llama", intermediate_size=neurons)), random_ids(6, seed=10)
    for refine, sample in ((0, 0), (16, 32)):
        found = dp.attribute(
            ids, Neurons(layers="all"), 5, method=Adjoint(refine=refine, sample=sample), temperature=temperature
        )
        assert all(one.scores.isfinite().all() and one.completeness_error < 1e-3 for one in found), found
        assert no_nan(found.estimate)


def test_a_wild_model_says_so_loudly():
    """More loud neurons than are carried, at a temperature where one of them takes all."""
    dp, ids = DePass(build_model("llama", intermediate_size=1500, initializer_range=1.0)), random_ids(6)
    with pytest.warns(ApproximationWarning, match="adjoint scores: ") as said:
        found = dp.attribute(ids, Neurons(0), 5, method="adjoint", temperature=1e-3)
    assert found.warnings and "WARNING: " in str(found) and found.to_dict()["warnings"] == found.warnings
    assert said[0].filename == __file__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    dp, ids = build("qwen2", dtype), random_ids(6, seed=11)
    found = dp.attribute(ids, Neurons(layers="all"), method=Adjoint(refine=16))
    exact = dp.attribute(ids, Neurons(layers="all"), method="exact")
    assert found.dtype == str(dtype)[6:] and found.scores.dtype == torch.float32
    for one, other in zip(found, exact, strict=True):
        assert torch.corrcoef(torch.stack([one.scores, other.scores]))[0, 1] > 0.97
    low = dp.attribute(ids, Neurons(layers="all"), method=Adjoint(refine=16), compute_dtype=dtype)
    assert torch.corrcoef(torch.stack([low.scores.flatten(), found.scores.flatten()]))[0, 1] > 0.97


@settings(max_examples=12, deadline=None)
@given(
    hidden=st.sampled_from([8, 24]),
    neurons=st.integers(1, 40),
    layers=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    length=st.integers(1, 7),
    scale=st.sampled_from([0.02, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_small_model(hidden, neurons, layers, groups, length, scale, seed):
    model = build_model(
        "llama",
        seed,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4 // groups,
        initializer_range=scale,
    )
    dp, ids = DePass(model), random_ids(length, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rough = dp.attribute(ids, Neurons(layers="all"), 3, method=Adjoint(refine=0, sample=0))
        fine = dp.attribute(ids, Neurons(layers="all"), 3, method=Adjoint(refine=neurons * layers, sample=4))
    exact = dp.attribute(ids, Neurons(layers="all"), 3, method="exact")
    assert rough.completeness_error <= 1e-4 and fine.scores.isfinite().all()
    assert torch.allclose(rough.scores[-1], exact.scores[-1], atol=1e-5 * float(exact.scores.abs().max()) + 1e-9)
    if scale == 0.02:
        assert_close(fine.scores, exact.scores, 0.02)


@torch.no_grad()
def test_mean_field_alone_keeps_shares_at_most_one():
    dp, ids = extreme("weights")[0], random_ids(6)
    trace = dp.trace(ids)
    start = make_start(Neurons(0), dp.adapter, trace, 0, 6, False, torch.float32)
    stack = LayerStack(dp.adapter, trace, 0, 6, dp.adapter.n_layers, torch.float32, torch.float32)
    forward = mean_field(stack, [start], [explicit_rows(torch.arange(4))], Approximation(0.1))
    for step in forward.steps:
        crowd = step.crowd
        assert (crowd.share <= 1.0 + 1e-5).all() and crowd.slope.max() <= 1.0 and crowd.mean.isfinite().all()
