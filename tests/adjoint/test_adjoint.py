"""The adjoint sweep against exact propagation: exact where it can be, second order elsewhere, finite always."""

from functools import partial

import pytest
import torch

from depass_fast import Custom, DePass, Features, Neurons
from depass_fast.adjoint.approximation import Approximation
from depass_fast.adjoint.backward import linear_scores
from depass_fast.adjoint.crowd import Crowd
from depass_fast.adjoint.estimate import spearman
from depass_fast.adjoint.forward import Forward, Step, mean_field
from depass_fast.adjoint.maps import LayerMaps
from depass_fast.adjoint.refine import scores_given_z
from depass_fast.adjoint.rows import ExplicitRows
from depass_fast.adjoint.stack import LayerStack
from depass_fast.adjoint.starts import DenseRows, make_start
from depass_fast.allocation import Allocation, taking_part
from depass_fast.backends import ReferenceBackend
from depass_fast.components.start import meets_bias
from depass_fast.inputs.targets import parse_target
from depass_fast.options import Adjoint
from depass_fast.readout.own import Places
from depass_fast.readout.targets import resolve_targets
from tests.support.adjoint import assert_close, explicit_rows
from tests.support.components import Dictionary, custom
from tests.support.family_models import available, build_model, build_variant
from tests.support.models import FAMILIES, build, random_ids
from tests.support.steps import start_state

pytestmark = pytest.mark.filterwarnings("ignore::depass_fast.ApproximationWarning")
T = 0.1


# ------------------------------------------------------------------------------------------------ exact where it can be


def exact_steps(dp: DePass, trace, kind, read: int) -> tuple[list[Step], Forward, torch.Tensor]:
    """The steps of a sweep as the exact run has them: log Z of all components, the crowd's mean gate."""
    adapter, n = dp.adapter, read + 1
    has_bias = meets_bias(kind, adapter, None, Allocation(temperature=T))
    start = make_start(kind, adapter, trace, 0, n, has_bias, torch.float64)
    state = dp.start(trace, kind, backend="reference", state_dtype="float64") if kind.site != "resid_post" else None
    steps = []
    reference = ReferenceBackend()
    for index in range(start.entering, adapter.n_layers):
        if state is None:
            state = start_state(dp, trace, kind, backend="reference", state_dtype="float64")
        layer, record = adapter.layer(index), trace.layers[index]
        queries = slice(read, n) if index == adapter.n_layers - 1 else slice(0, n)
        if state.site == "resid_pre":
            state = reference.aggregate_ov(state, layer.attention, record.attention)
        maps = LayerMaps(layer, record, slice(0, n), queries, torch.float64, torch.float64)
        x = state.block(0)[queries].transpose(0, 1)
        g = maps.gates(x)
        bias = state.layout.index("bias")
        if bias is not None and maps.gate_constant is not None:
            g[bias] += maps.gate_constant
        alive = (x != 0).any(-1).T
        part = taking_part(alive, torch.zeros_like(alive), bias, maps.gate_constant).transpose(0, 1)
        u = (g / T).masked_fill(~part, -torch.inf)
        log_z, mean = torch.logsumexp(u, 0)[None], (g[len(state.layout.components[0].extras) :] / T).mean(0)[None]
        crowd = Crowd(log_z, (mean - log_z).exp(), mean, torch.ones_like(log_z[..., :1]))
        steps.append(Step(index, queries, crowd))
        state = reference.allocate_mlp(state, layer.mlp, record.mlp, dp.options.build(adapter).allocation)
        state.layer, state.site = index + 1, "resid_pre"
    rows = ExplicitRows(torch.zeros(0, 1, adapter.hidden_size, dtype=torch.float64), [], [], Approximation(T))
    return steps, Forward([start], steps, rows, alive=[None]), start


def stack_of(dp: DePass, trace, n: int) -> LayerStack:
    return LayerStack(dp.adapter, trace, 0, n, dp.adapter.n_layers, torch.float64, torch.float64)


def seeds(dp: DePass, trace, read: int, target=5) -> torch.Tensor:
    spec, nothing = parse_target(target, dp.adapter, None), torch.zeros_like(trace.normed_final)
    places = Places([(0, read)], [trace.input_ids.cpu()], nothing)
    (directions,) = resolve_targets([spec], dp.adapter, None, places, nothing[read, None], torch.float64)
    norm = dp.adapter.final_norm()
    return directions.vectors * norm.weight.double() * norm.scale(trace.resid_final[read].double())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_refinement_is_exact_given_an_exact_log_z(name):
    """One function refines; with log Z of the exact run it returns the exact run's scores."""
    dp, ids = build(name, torch.float64), random_ids(6, seed=4)
    trace, approximation = dp.trace(ids), Approximation(T)
    for kind in (Neurons(0), custom(dp, ids, site="resid_mid", scale=1.0)):
        steps, _, start = exact_steps(dp, trace, kind, len(ids) - 1)
        for step in steps:
            step.crowd.exact = True
        chosen = [torch.arange(0, len(start.named), 2)]
        stack, directions = stack_of(dp, trace, len(ids)), seeds(dp, trace, len(ids) - 1)
        found = scores_given_z(stack, [start], steps, chosen, directions, approximation, budget=1 << 14).scores[:, 0]
        exact = dp.attribute(trace, kind, 5, backend="reference").scores
        assert_close(found, exact[: len(start.named) : 2], 1e-9)


@torch.no_grad()
def test_the_error_falls_with_the_square_of_the_components():
    dp, ids = build("qwen2", torch.float64), random_ids(6, seed=5)
    trace, approximation = dp.trace(ids), Approximation(T)
    errors = []
    for scale in (1e-2, 5e-3, 2.5e-3):
        kind = custom(dp, ids, layer=0, scale=scale)
        _, forward, _ = exact_steps(dp, trace, kind, len(ids) - 1)
        stack, directions = stack_of(dp, trace, len(ids)), seeds(dp, trace, len(ids) - 1)
        found = linear_scores(stack, forward, directions, approximation)[0][0]
        exact = dp.attribute(trace, kind, 5, backend="reference").scores
        errors.append(float((found - exact[: len(found)]).norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15) and errors[1] / errors[2] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases", "mistral-window"])
def test_lambda_agrees_with_autograd(name):
    """Equal components are all at the crowd's mean: there λ is the very gradient of a score with Z held fixed."""
    dp, ids = build(name, torch.float64), random_ids(6, seed=6)
    trace, read = dp.trace(ids), 5

    def held(gates, temperature):
        z = (gates.values / temperature).masked_fill(~gates.eligible, -torch.inf)
        return torch.exp(z - torch.logsumexp(z, 1, keepdim=True).detach())

    one = torch.randn(len(ids), 1, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kind = Custom(0, 0.05 * one.expand(-1, 4, -1).contiguous())
    state = dp.start(trace, kind, backend="reference")
    leaf = state.rows.clone().requires_grad_()
    state.rows = leaf * 1.0
    allocation = dp.options.updated({"allocation": held}).build(dp.adapter).allocation
    for index, record in enumerate(trace.layers):
        layer, backend = dp.adapter.layer(index), ReferenceBackend()
        state = backend.allocate_mlp(
            backend.aggregate_ov(state, layer.attention, record.attention), layer.mlp, record.mlp, allocation
        )
    seed = seeds(dp, trace, read)
    extras = len(state.layout.components[0].extras)
    (gradient,) = torch.autograd.grad((state.block(0)[read, extras] * seed[0]).sum(), leaf)
    expected = gradient.view(len(ids), -1, 32)[:, extras]

    class Spy(DenseRows):
        def project(self, x):
            seen.append(x[0].clone())
            return super().project(x)

    with torch.no_grad():
        _, forward, start = exact_steps(dp, trace, kind, read)
    seen: list[torch.Tensor] = []
    start.named = Spy(start.named.states)
    with torch.no_grad():
        linear_scores(stack_of(dp, trace, read + 1), forward, seed, Approximation(T))
    assert torch.allclose(seen[0], expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_unrefined_shares_sum_to_the_logit(name):
    """Whatever the crowd is said to do, what it takes is what the explicit ones leave: the sum stays exact."""
    dp, ids = build(name), random_ids(7, seed=7)
    for kind in (
        Neurons(layers="all"),
        custom(dp, ids, site="resid_mid"),
        Features(0, Dictionary(size=12), "resid_mid"),
    ):
        found = dp.attribute(ids, kind, [5, (9, 3)], method=Adjoint(refine=0, sample=0))
        assert found.completeness_error <= 2e-5 and found.estimate is None
        refined = dp.attribute(ids, kind, [5, (9, 3)], method=Adjoint(refine=8, sample=8))
        assert refined.completeness_error < 0.3 and refined.estimate is not None
        each = list(refined) if kind.is_layered else [refined]
        for one in each:  # the error is stated, not hidden
            missing = (one.scores.sum(1) - one.target_logits).abs() / one.scores.abs().sum(1)
            assert one.completeness_error == pytest.approx(float(missing.max()), rel=0.5, abs=1e-6)


# --------------------------------------------------------------------------------------------------- close elsewhere


@pytest.mark.parametrize("name", FAMILIES)
def test_close_to_exact_in_every_family(name):
    """Tiny wide-open random models (weights of 0.2, 48 neurons): far harsher than a real one."""
    dp, ids = build(name), random_ids(8, seed=8)
    found = dp.attribute(ids, Neurons(layers="all"), 5, method=Adjoint(refine=16))
    exact = dp.attribute(ids, Neurons(layers="all"), 5, method="exact")
    assert found.layers == exact.layers == [0, 1, 2] and found.labels == exact.labels
    assert found.scores.shape == exact.scores.shape == (3, 48)
    for one, other in zip(found, exact, strict=True):
        assert one.labels == other.labels
        assert torch.corrcoef(torch.stack([one.scores, other.scores]))[0, 1] > 0.97
    assert_close(found[2].scores, exact[2].scores, 1e-5)  # nothing is left to be approximated


def test_the_demo_model(demo):
    ids = "Nyria Morstam speaks"
    found = demo.attribute(ids, Neurons(layers="all"), method=Adjoint(refine=48))
    exact = demo.attribute(ids, Neurons(layers="all"), method="exact")
    for one, other in zip(found, exact, strict=True):
        assert spearman(one.scores[:-1], other.scores[:-1]) > 0.99
        assert torch.corrcoef(torch.stack([one.scores[:-1], other.scores[:-1]]))[0, 1] > 0.99
    top = {label for label, _ in exact.top(20)}
    assert len(top & {label for label, _ in found.top(20)}) >= 19
    assert found.estimate.spearman > 0.98 and found.estimate.partition_error is not None


def test_explicit_components_repair_a_loud_neuron(demo):
    """A neuron at a hundred times its own drive: wrong to first order, right when it is carried."""
    trace = demo.trace("Nyria Morstam speaks")
    states = demo.start(trace, Custom(1, torch.zeros(trace.length(0), 1, demo.adapter.hidden_size))).dense()
    parts = (
        torch.randn(trace.length(0), 40, demo.adapter.hidden_size, generator=torch.Generator().manual_seed(0)) * 0.01
    )
    parts[:, 7] *= 300
    del states
    kind = Custom(1, parts)
    exact = demo.attribute(trace, kind).scores
    found = demo.attribute(trace, kind, method=Adjoint(refine=0, sample=0)).scores
    assert_close(found[7], exact[7:8], 0.05)


def test_sparse_components_take_no_share_where_they_are_zero():
    """A feature that is zero up to a position receives nothing there: the offset counts only where it is alive."""
    for name in ("llama-gqa", "mistral-window"):
        dp, ids = build(name), random_ids(8, seed=9)
        states = torch.randn(8, 12, 32, generator=torch.Generator().manual_seed(3)) * 0.02
        states *= (torch.rand(8, 12, 1, generator=torch.Generator().manual_seed(4)) < 0.3).float()
        states[:, 5] = 0.0
        for site in ("resid_pre", "resid_mid"):
            kind = Custom(0, states, site=site)
            exact = dp.attribute(ids, kind, 5).scores
            found = dp.attribute(ids, kind, 5, method=Adjoint(refine=0, sample=0))
            assert found.scores[5] == 0.0 == exact[5]
            assert torch.corrcoef(torch.stack([found.scores[:12], exact[:12]]))[0, 1] > 0.99
            assert found.completeness_error <= 2e-5


@pytest.mark.parametrize("explicit", [0, 12])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases"])
@torch.no_grad()
def test_a_dead_neuron_has_the_exact_log_z(name, explicit):
    """Nobody drives it, so whoever is alive shares it: the crowd by its number, explicit rows one by one."""
    model_type, changes = FAMILIES[name]
    dp, ids = DePass(build_model(model_type, **changes).double()), random_ids(6, seed=2)
    dp.adapter.layer(1).mlp.gate.module.weight[3] = 0.0
    states = 1e-3 * torch.randn(6, 12, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    states[:4, 7] = 0.0
    trace, kind = dp.trace(ids), Custom(1, states, site="resid_mid")
    steps, _, start = exact_steps(dp, trace, kind, len(ids) - 1)
    carried = explicit_rows(torch.arange(explicit))
    found = mean_field(stack_of(dp, trace, len(ids)), [start], [carried], Approximation(T, quiet=0.0))
    for one, other in zip(found.steps[:1] if explicit == 0 else found.steps, steps, strict=False):
        part, tolerance = (slice(None), 1e-9) if explicit else (slice(3, 4), 1e-4)  # κ is one for all neurons
        assert_close(one.crowd.log_z[..., part], other.crowd.log_z[..., part], tolerance)


def test_a_crowd_that_is_loud_as_a_whole(monkeypatch):
    """Hardly any of many loud components carried, at a mad temperature: the measured scatter bounds every step."""
    dp, ids = DePass(build_model("llama", intermediate_size=100, num_hidden_layers=12)), random_ids(6)
    kind, largest = Custom(0, torch.randn(6, 40, 32, generator=torch.Generator().manual_seed(0))), []
    for scatter in (True, False):
        changed = partial(Approximation, scatter=scatter, at_most=4)
        monkeypatch.setattr("depass_fast.methods.adjoint.Approximation", changed)
        found = dp.attribute(ids, kind, 5, method=Adjoint(refine=0, sample=0), temperature=1e-6).scores
        largest.append(float(found.abs().max()))
    exact = dp.attribute(ids, kind, 5, temperature=1e-6).scores.abs().max()
    assert largest[0] < 10 * exact and largest[1] > 1e6 * exact


@torch.no_grad()
def test_a_layer_s_norm_comes_to_the_components():
    """Components that start behind a layer are on its device; the layer that they enter may be on the next one."""
    dp = build("llama-gqa")
    stack = stack_of(dp, dp.trace(random_ids(6)), 6)
    for like in (torch.empty(0, device="meta"), torch.empty(0, dtype=torch.float64)):
        assert all((x.device, x.dtype) == (like.device, like.dtype) for x in stack.reading(1, like))


# ---------------------------------------------------------------------------------------------------- other families

_EXPERTS = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 8}


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "gemma2", "qwen2_moe", "opt", "mpt", "olmo2", "phi"])
def test_other_families(model_type):
    """Norms before and behind a branch, parallel branches, plain MLPs, experts: exact and complete as in a Llama."""
    dp = DePass(build_model(model_type, **(_EXPERTS if model_type == "qwen2_moe" else {})))
    trace = dp.trace(random_ids(6, seed=2))
    exact = dp.attribute(trace, Neurons(layers="all"), 5, method="exact")
    found = dp.attribute(trace, Neurons(layers="all"), 5, method=Adjoint(refine=500))
    for one, other in zip(found, exact, strict=True):
        assert one.labels == other.labels
        assert_close(one.scores, other.scores, 0.05)
    rough = dp.attribute(trace, Neurons(layers="all"), 5, method=Adjoint(refine=0, sample=0))
    assert rough.completeness_error <= 1e-4


@pytest.mark.parametrize("name", ["deepseek_v3", "youtu", "gpt_oss"])
def test_latents_and_sinks(name):
    """Values from a latent behind a norm of its own, and attention that sums to less than one: close to exact."""
    if not available(name):
        pytest.skip("the installed transformers does not have it")
    dp = DePass(build_variant(name))
    trace = dp.trace(random_ids(9, seed=1))
    exact, found = (
        dp.attribute(trace, Neurons(layers="all"), [None, (9, 3)], method=method)
        for method in ("exact", Adjoint(refine=16))
    )
    for one, other in zip(found, exact, strict=True):
        assert one.labels == other.labels
        neurons = [index for index, label in enumerate(one.labels) if label not in ("bias", "rest")]
        for scores in zip(one.scores[..., neurons], other.scores[..., neurons], strict=True):
            assert torch.corrcoef(torch.stack(scores))[0, 1] >= 0.99


def test_a_component_that_was_refined_and_released_was_refined(demo):
    """The sample is drawn from the others: a refined component that went back to the crowd was not missed."""
    found = demo.attribute("Nyria Morstam speaks", Neurons(layers="all"), " Italian", method=Adjoint(refine=100))
    assert found.estimate.missed == 0.0 and not found.warnings
