"""Plans of adjoint sweeps, of components that only the trace can count, of the triton backend; runs that fit."""

import json

import pytest
from torch.utils.flop_counter import FlopCounterMode

import depass_fast.request
from depass_fast import DePass, Features, Neurons, Tokens
from depass_fast.adjoint import sweep
from depass_fast.backends.triton import cost
from depass_fast.backends.triton.backend import TritonBackend
from depass_fast.cli.main import main
from depass_fast.options import Adjoint
from depass_fast.planning import adjoint as outlook_of_sweeps
from depass_fast.planning import fit, planner
from depass_fast.planning.adjoint import sweep_outlook
from depass_fast.planning.planner import make_plan
from depass_fast.planning.shapes import RunShape
from tests.support.adjoint import assert_close
from tests.support.components import Dictionary
from tests.support.family_models import build_model, build_variant
from tests.support.models import build, random_ids

pytestmark = pytest.mark.filterwarnings("ignore::depass_fast.ApproximationWarning")
IDS = random_ids(40, seed=1)
ALL = Neurons(layers="all")


@pytest.fixture(scope="module")
def wide() -> DePass:
    """More neurons than are propagated one by one by default, few of them loud."""
    return DePass(build_model("llama", intermediate_size=2048, num_hidden_layers=3, initializer_range=0.05))


@pytest.fixture
def free(monkeypatch):
    def say(size):
        for place in (planner, fit, sweep):
            monkeypatch.setattr(place, "available", lambda device: size)

    return say


# -- adjoint sweeps ---------------------------------------------------------------------------------------------------


def test_a_plan_is_of_the_method_that_attribute_takes(wide):
    def method(*given, **options):
        return wide.plan(40, *given, measure=False, **options).method

    assert (method(ALL), method(Neurons(0)), method(Tokens())) == ("adjoint", "exact", "exact")
    assert (method(ALL, method="exact"), method(Neurons(0), method=Adjoint(refine=3))) == ("exact", "adjoint")
    with pytest.raises(ValueError, match="method: 'adjoint' is for many"):
        method(Tokens(), method="adjoint")
    with pytest.raises(ValueError, match="stream: method='adjoint'"):
        method(ALL, method="adjoint", stream=True)
    plan = wide.plan(40, ALL)
    quiet, loud = plan.estimates
    assert plan.of("torch") is loud and plan.of("adjoint") is quiet and plan.layer == 0
    assert 0 < quiet.seconds < loud.seconds and quiet.peak_bytes <= loud.peak_bytes
    assert "adjoint, many loud" in str(plan)
    assert loud.flop < wide.plan(40, ALL, method="exact", measure=False).flop


def test_more_refinement_a_longer_prompt_and_more_workspace_take_more(wide):
    def peak(length=40, refine=0, sample=0, **options):
        method = Adjoint(refine=refine, sample=sample)
        return wide.plan(length, ALL, measure=False, method=method, **options).of().peak_bytes

    assert peak() < peak(refine=2000) and peak() <= peak(sample=64) and peak(length=20) < peak()
    assert peak(memory_budget=1 << 16) < peak()
    assert peak(allocation="taylor") < peak()


@pytest.mark.parametrize("kind", [Neurons(0), ALL])
@pytest.mark.parametrize(("refine", "sample"), [(0, 0), (64, 0), (400, 64), (0, 400)])
def test_the_arithmetic_of_a_sweep_is_what_is_done(wide, kind, refine, sample, monkeypatch):
    trace, found, find = wide.trace(IDS), [], sweep.Sweep._loud
    monkeypatch.setattr(sweep.Sweep, "_loud", lambda *given: found.append(find(*given)) or found[-1])
    with FlopCounterMode(display=False) as counted:
        wide.attribute(trace, kind, 7, method=Adjoint(refine=refine, sample=sample))
    loud = max(len(one.index) for group in found for one in group)
    method = Adjoint(refine, "all", sample)
    plan = make_plan(RunShape(wide.adapter, [len(IDS)], kind, wide.options, traced=True, method=method), loud=loud)
    off = 1.7 if (refine or sample) and kind.is_layered else 1.2  # of which layers they are, nobody knows beforehand
    ratio = plan.flop / counted.get_total_flops()
    assert 1 / off < ratio < off


def test_a_sweep_that_cannot_fit_is_refused_before_any_work(wide, free, monkeypatch):
    method = Adjoint(1500, "all", 64)
    shape = RunShape(wide.adapter, [40], ALL, wide.options, None, False, method=method)
    free(sweep_outlook(shape).least(1 << 24) - (1 << 18))
    with monkeypatch.context() as patch:
        patch.setattr(wide.adapter.model, "forward", None)  # no work
        with pytest.raises(MemoryError, match=r"neurons, adjoint: needs .*It fits with method=Adjoint") as refused:
            wide.attribute(IDS, ALL, 7, method=method)
        advice = str(refused.value).split("It fits with ")[1].split(", or with ")
        assert advice[0].startswith("method=Adjoint(refine=0, sample=0) (") and advice[1].startswith("a prompt of 20 t")
        free(sweep_outlook(shape).least(1 << 24))
        with pytest.raises(MemoryError, match="or with one of these 3 prompts at a time"):
            wide.attribute([IDS] * 3, ALL, 7, method=method)
    assert wide.attribute([IDS], ALL, 7, method=method)[0].method == "adjoint"
    free(sweep_outlook(shape).least(1 << 24) - (1 << 18))
    assert wide.attribute(IDS, ALL, 7, method=Adjoint(refine=0, sample=0)).method == "adjoint"
    assert wide.attribute(IDS[:20], ALL, 7, method=method).method == "adjoint"
    free(100_000)
    with pytest.raises(MemoryError, match="Take a shorter prompt"):
        wide.attribute(IDS, ALL, 7)


def test_a_sweep_begins_with_the_workspace_that_there_is_room_for(wide, free, monkeypatch):
    trace = wide.trace(IDS)
    monkeypatch.setattr(outlook_of_sweeps, "default_workspace", lambda free, cuda: 1 << 28)  # as if all of it were free
    method = Adjoint(1500, "all", 64)
    usual = wide.attribute(trace, ALL, 7, method=method)
    outlook = sweep_outlook(RunShape(wide.adapter, [40], ALL, traced=True, method=method))
    size = outlook.peak(8 << 20, None)
    assert outlook.peak(1 << 28, None) > size
    taken, begin = [], sweep.Sweep._attempt
    monkeypatch.setattr(sweep.Sweep, "_attempt", lambda *given: taken.append(given[-1]) or begin(*given))
    free(size)
    found = wide.attribute(trace, ALL, 7, method=method)
    assert taken[-1] == 8 << 20
    assert_close(found.scores.flatten(), usual.scores.flatten(), 1e-5)


def test_a_sweep_for_every_position_and_token_is_planned(wide):
    def flop(prompt=IDS, **given):
        return wide.plan(prompt, ALL, method="adjoint", measure=False, **given).of("adjoint").flop

    whole = len(IDS)
    assert flop(position=[2, 5, -1]) == sum(flop(position=at) for at in (2, 5, whole - 1)) > 2 * flop(position=5)
    assert flop(continuation=[3, 4, 5]) == sum(flop(whole + more) for more in range(3))
    exact = [wide.plan(12, Tokens(), position=at, measure=False).flop for at in ([3, 5, -2], -2)]
    assert exact[0] == exact[1] == wide.plan(IDS[:9], Tokens(), continuation=[1, 2, 3], measure=False).flop


def test_the_sweeps_of_several_positions_are_what_is_done(wide):
    method, at = Adjoint(refine=0, sample=0), [5, 20, -1]
    trace = wide.trace(IDS)
    with FlopCounterMode(display=False) as counted:
        wide.attribute(trace, ALL, 7, method=method, position=at)
    planned = wide.plan(trace, ALL, method=method, position=at, measure=False).of("adjoint").flop
    assert 1 / 1.2 < planned / counted.get_total_flops() < 1.2


def test_a_plan_refuses_what_an_attribution_refuses(wide):
    for beside in ({"position": 1}, {"position": [-1]}, {"end": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(beside))}: a continuation is read in front of each"):
            wide.plan(IDS, Tokens(), continuation=[3], measure=False, **beside)
    assert wide.plan(IDS, Tokens(), continuation=[3], position=-1, measure=False).lengths == (len(IDS) + 1,)


def test_the_command_plans_positions_and_continuations(capsys):
    arguments = ["plan", "--model", "demo", "--components", "tokens", "--gemm-tflops", "1"]

    def planned(*given):
        assert main([*arguments, "--json", *given]) == 0
        return json.loads(capsys.readouterr().out)

    assert planned("--length", "20", "--position", "3,8")["rows"] == planned("--length", "9")["rows"]
    text = ("--prompt", "Nyria Morstam")
    given, alone = planned(*text, "--continuation", " speaks Italian"), planned(*text)["lengths"][0]
    assert given["lengths"][0] > alone and given["rows"] == planned("--length", str(given["lengths"][0] - 1))["rows"]
    assert main([*arguments, "--length", "20", "--continuation", " x"]) == 2
    assert "--continuation: it follows a text" in capsys.readouterr().err


def test_the_command_plans_sweeps(capsys):
    arguments = ["plan", "--model", "demo", "--length", "20", "--components", "neurons", "--gemm-tflops", "1", "--json"]
    for flags, method in (
        (["--layer", "all", "--method", "adjoint"], "adjoint"),
        (["--layer", "0", "--refine", "9"], "adjoint"),
        (["--layer", "0"], "exact"),
    ):
        assert main([*arguments, *flags]) == 0
        assert json.loads(capsys.readouterr().out)["method"] == method
    assert main([*arguments, "--layer", "0", "--refine", "-1"]) == 2
    assert "--refine: -1 is out of range" in capsys.readouterr().err


# -- components whose number the trace tells --------------------------------------------------------------------------


@pytest.fixture
def unknown(request):
    if request.param == "features":
        return build("llama-gqa"), Features(1, sae=Dictionary(size=3000), site="resid_post")
    return DePass(build_variant("mixtral")), Neurons(1)


@pytest.mark.parametrize("unknown", ["features", "experts"], indirect=True)
def test_a_trace_tells_how_many_components_there_are(unknown):
    dp, kind = unknown
    prompts = [random_ids(9), random_ids(3, seed=2)]
    trace = dp.trace(prompts)
    before, after = (dp.plan(what, kind, measure=False) for what in (prompts, trace))
    state = dp.start(trace, kind)
    assert before.upper_bound and not after.upper_bound
    assert before.rows >= after.rows == state.layout.n_rows
    assert after.n_components == max(len(state.labels_of(p)) for p in range(2))


@pytest.mark.parametrize("method", [None, "adjoint"])
@pytest.mark.parametrize("unknown", ["features", "experts"], indirect=True)
def test_what_cannot_fit_is_refused_as_soon_as_it_is_known(unknown, method, free, monkeypatch):
    dp, kind = unknown
    monkeypatch.setattr(fit, "_LEAST_WORKSPACE", 1 << 12)
    ids, done = random_ids(40), []
    monkeypatch.setattr(depass_fast.request, "initial_state", lambda *_, **__: done.append("decomposed"))
    monkeypatch.setattr(sweep.Sweep, "run", lambda *_: done.append("swept"))
    capture = depass_fast.request.capture
    monkeypatch.setattr(depass_fast.request, "capture", lambda *given: done.append("traced") or capture(*given))
    free(2_000)
    with pytest.raises(MemoryError, match=f"{kind.kind}.*: needs"):
        dp.attribute(ids, kind, 7, method=method)
    assert not done  # not even the trace fits
    trace = dp.trace(ids)
    need = fit.least_bytes(dp.plan(trace, kind, measure=False), "torch")
    if method:
        counts, how = (
            planner.known_counts(kind, dp.adapter, trace),
            Adjoint(64, "all", 64),
        )
        sweeps = sweep_outlook(RunShape(dp.adapter, [40], kind, traced=True, counts=counts, method=how))
        need = sweeps.peak(1, 0)
    done.clear()
    free(int(0.9 * need))
    with pytest.raises(MemoryError, match=f"{kind.kind}.*: needs") as refused:
        dp.attribute(trace, kind, 7, method=method)
    assert not done and "a prompt of" not in str(refused.value)


def test_a_run_of_features_gets_the_workspace_that_there_is_room_for(free, monkeypatch):
    monkeypatch.setattr(fit, "_LEAST_WORKSPACE", 1 << 12)
    dp, kind, ids = build("llama-gqa"), Features(1, sae=Dictionary(size=3000), site="resid_post"), random_ids(40)
    usual = dp.attribute(ids, kind, 7)
    trace = dp.trace(ids)
    free(fit.least_bytes(dp.plan(trace, kind, measure=False), "torch") + 1000)
    for what in (ids, trace):
        tight = dp.attribute(what, kind, 7)
        assert tight.memory_budget < usual.memory_budget
        assert_close(tight.scores, usual.scores, 1e-5)


@pytest.mark.parametrize("layers", [[1], "all"])
def test_experts_of_several_layers_get_the_workspace_that_there_is_room_for(layers, free, monkeypatch):
    """Only the trace tells how many there are; the workspace that is then found is the one that is used."""
    monkeypatch.setattr(fit, "_LEAST_WORKSPACE", 1 << 12)
    dp, kind, ids = DePass(build_variant("mixtral")), Neurons(layers=layers), random_ids(40)
    usual = dp.attribute(ids, kind, 7, method="exact")
    trace, first = dp.trace(ids), Neurons(kind.each(dp.adapter)[0].layer)
    counts = [max(one.counts(dp.adapter, trace)[0] for one in kind.each(dp.adapter))]
    plan = make_plan(RunShape(dp.adapter, [40], first, dp.options, traced=True, counts=counts))
    free(fit.least_bytes(plan, "torch") + 1000)
    tight = dp.attribute(trace, kind, 7, method="exact")
    for one, other in zip(tight, usual, strict=True):
        assert one.memory_budget < other.memory_budget
        assert_close(one.scores, other.scores, 1e-5)


def test_a_dictionary_encodes_a_prompt_no_more_often_for_being_planned(monkeypatch):
    sae, dp = Dictionary(), build("llama-gqa")
    trace, calls, encode = dp.trace(random_ids(9)), [], sae.encode
    sae.encode = lambda x: calls.append(x) or encode(x)
    dp.attribute(trace, Features(1, sae=sae, site="resid_post"), 7)
    assert len(calls) == 2  # once for the activations, once for the decoder's offset


# -- the triton backend -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "length", "budget", "rule"),
    [
        (Tokens(), 30, 30_000, "softmax"),
        pytest.param(Tokens(), 30, 1 << 25, "softmax", marks=pytest.mark.thorough),
        (Neurons(0), 7, 30_000, "softmax"),
        (Neurons(0), 7, 1 << 25, "softmax"),
        (Tokens(), 20, 30_000, "shapley"),
        pytest.param(Neurons(0), 4, 1 << 25, "shapley", marks=pytest.mark.thorough),
    ],
)
def test_the_arena_is_as_large_as_planned(kind, length, budget, rule, monkeypatch):
    options = {"backend": "triton", "memory_budget": budget, "allocation": rule}
    dp = DePass(build_model("llama", intermediate_size=200), **options)
    trace, taken, take = dp.trace(random_ids(length)), [], TritonBackend._buffers
    monkeypatch.setattr(
        TritonBackend, "_buffers", lambda self, device, *sizes: taken.append(sum(sizes)) or take(self, device, *sizes)
    )
    planned = []
    monkeypatch.setattr(
        cost, "arena_bytes", lambda work, inner=cost.arena_bytes: planned.append(inner(work)) or planned[-1]
    )
    dp.plan(trace, kind, method="exact", measure=False)
    dp.decompose(trace, kind)
    assert planned[0] * 0.9 <= max(taken) <= planned[0]


def test_a_state_that_streams_on_a_cpu_is_in_the_peak():
    """On a CPU the state in host memory counts as the device's."""
    dp = build("llama-gqa")
    plan = dp.plan(60, Tokens(), measure=False)
    streamed = plan.of("torch, streamed")
    assert streamed.host_bytes == 0 and streamed.peak_bytes > plan.state_bytes + plan.trace_bytes


def test_what_only_starts_needs_no_room_to_be_carried(monkeypatch):
    fitted, ends = depass_fast.request.fitted, []
    monkeypatch.setattr(depass_fast.request, "fitted", lambda run, shape: ends.append(shape.end) or fitted(run, shape))
    experts = DePass(build_variant("mixtral"))
    assert experts.start(experts.trace(random_ids(6)), Neurons(1)).layer == 2
    assert ends == [2, 2]  # once before the trace tells how many there are, once after
    ends.clear()
    dp, trace = build("llama-gqa"), build("llama-gqa").trace(random_ids(6))
    assert dp.start(trace, Neurons(1)).layer == 2 and ends == [2]
    dp.decompose(trace, Neurons(1), end=3)
    assert ends == [2, 3]
    dp.partition(trace, Neurons(1), stream=False)  # a run that streams, whatever was asked for
    assert ends == [2, 3, None]
