"""Running out of memory changes no number; what cannot fit is refused before any work."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import depass_fast.planning.fit
import depass_fast.planning.planner
from depass_fast import Custom, DePass, Heads, Modules, Neurons, Tokens
from depass_fast.planning.fit import fitted, least_bytes
from depass_fast.planning.planner import make_plan
from depass_fast.planning.shapes import RunShape
from depass_fast.runtime.budget import Budget
from depass_fast.trace.finite import check_finite
from tests.support.family_models import build_model
from tests.support.models import build, random_ids
from tests.support.states import close
from tests.support.steps import start_state

KINDS = {"tokens": Tokens(), "heads": Heads(0), "neurons": Neurons(0)}


class Shortage(TorchDispatchMode):
    """Fails the ``at``-th operation on tensors of all that blocks and chunks do, before it does anything, once."""

    def __init__(self, monkeypatch, at, error):
        super().__init__()
        self.count, self.at, self.error = 0, at, error
        each = Budget.each

        def watched(budget, device, cut, step):
            def piece(part):
                with self:
                    step(part)

            each(budget, device, cut, piece)

        monkeypatch.setattr(Budget, "each", watched)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise self.error
        return function(*args, **(kwargs or {}))


ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("label", ["tokens", "heads"])
def test_running_out_of_memory_anywhere_in_triton_changes_nothing(label, monkeypatch):
    """Memory runs out in PyTorch's operations between the kernels; the kernels themselves allocate none."""
    executor = pytest.importorskip("triton.runtime.interpreter").GridExecutor
    launch = executor.__call__

    def unwatched(*arguments, **more):
        with _disable_current_modes():
            return launch(*arguments, **more)

    monkeypatch.setattr(executor, "__call__", unwatched)
    dp, kind = build("qwen2"), KINDS[label]
    trace, options = dp.trace([random_ids(3, seed=3), random_ids(2, seed=4)]), {"memory_budget": 4_000}

    def attempt(at):
        with monkeypatch.context() as patch:
            shortage = Shortage(patch, at, ERRORS["gpu"])
            return dp.decompose(trace, kind, end=2, backend="triton", **options).rows, shortage.count

    expected, total = attempt(-1)
    for at in (*range(1, total, total // 7), total):
        with pytest.warns(RuntimeWarning, match="results do not change"):
            assert close(attempt(at)[0], expected), at


@pytest.mark.parametrize(
    ("rule", "stream"), [("softmax", False), ("linear", False), ("linear", True), ("softmax", True)]
)
@pytest.mark.parametrize("label", KINDS)
def test_running_out_of_memory_anywhere_changes_nothing(label, rule, stream, monkeypatch):
    """Wherever it happens: at operations from the first to the last."""
    if stream and label == "neurons":
        pytest.skip("thousands of operations; tokens and heads pass through the same lines")
    dp, prompts, kind = build("qwen2"), [random_ids(5, seed=3), random_ids(3, seed=4)], KINDS[label]
    trace, options = dp.trace(prompts), {"memory_budget": 16_000, "allocation": rule, "stream": stream}

    def attempt(run, at, error=None):
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            shortage = Shortage(patch, at, error)
            result = run()
        assert [w for w in said if "carrying on with a workspace of 7.8 KiB" in str(w.message)] == said
        assert len(said) == (error is not None), at
        return result, shortage.count

    runs = {"attribute": lambda: dp.attribute(trace, kind, 7, **options)}
    runs["decompose"] = lambda: dp.decompose(trace, kind, **options)
    for name, run in runs.items():
        run()  # what is kept from one call to the next is made
        expected, total = attempt(run, -1)
        assert total > 100
        for i, at in enumerate([1, 2, 3, *range(4, total, total // 6), total - 1, total]):
            result, _ = attempt(run, at, list(ERRORS.values())[i % 3])
            if name == "decompose":
                assert close(result.rows, expected.rows), at
                continue
            for one, other in zip(result, expected, strict=True):
                assert close(one.scores, other.scores) and one.completeness_error < 1e-5, at
                assert (one.memory_budget, other.memory_budget) == (8_000, 16_000)


def test_memory_that_stays_short_is_an_error_that_says_what_to_do(monkeypatch):
    dp = build("llama-gqa")
    trace = dp.trace(random_ids(6))
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: (_ for _ in ()).throw(ERRORS["gpu"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            torch.OutOfMemoryError, match="room for the state and the trace. Take a state_dtype of half"
        ):
            dp.attribute(trace, Heads(0), 7)
    monkeypatch.undo()
    assert dp.attribute(trace, Heads(0), 7).completeness_error < 1e-5


def test_other_errors_pass_through():
    budget = Budget(1 << 20, lambda device: 0, lambda: None)

    def fails(piece):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        budget.each(torch.device("cpu"), lambda undone: [1], fails)
    assert budget.bytes(torch.device("cpu")) == 1 << 20


def test_an_undone_piece_is_cut_again_and_nothing_is_done_twice(monkeypatch):
    """100 units in pieces; every piece larger than 7 fails."""
    budget, done = Budget(64 << 10, lambda device: 0, lambda: None), []

    def cut(undone):
        size, first = budget.bytes(torch.device("cpu")) >> 10, 0 if undone is None else undone[0]
        return [range(i, min(i + size, 100)) for i in range(first, 100, size)]

    def step(piece):
        if len(piece) > 7:
            raise MemoryError
        done.extend(piece)

    with pytest.warns(RuntimeWarning, match="carrying on"):
        budget.each(torch.device("cpu"), cut, step)
    assert done == list(range(100))


@pytest.fixture
def free(monkeypatch):
    def say(size):
        for place in (depass_fast.planning.planner, depass_fast.planning.fit):
            monkeypatch.setattr(place, "available", lambda device: size)

    return say


def test_what_cannot_fit_is_refused_before_any_work(free, monkeypatch):
    dp, ids = build("llama-gqa"), random_ids(60)
    least = dp.plan(ids, Tokens(), measure=False)
    free(10_000)
    monkeypatch.setattr(dp.adapter.model, "forward", None)  # no work
    with pytest.raises(
        MemoryError, match=r"tokens: needs .* on cpu and 9.8 KiB are available: the state takes 228.8 KiB"
    ):
        dp.attribute(ids, Tokens())
    peak = least_bytes(least, "torch")
    free(peak - 1000)
    with pytest.raises(
        MemoryError, match=r"It fits with state_dtype='bfloat16' \(.*\), or with a prompt of 30 tokens \(.*\)\.$"
    ):
        dp.attribute(ids, Tokens())
    many = [random_ids(40, seed=i) for i in range(6)]
    free(least_bytes(dp.plan(many[:3], Tokens(), measure=False), "torch"))
    with pytest.raises(MemoryError, match="one of these 6 prompts at a time"):
        dp.attribute(many, Tokens())
    with pytest.raises(MemoryError, match="It fits with backend='torch'"):
        dp.attribute(many[:3], Tokens(), backend="reference")


def test_what_is_said_to_fit_does(free):
    dp, ids = build("llama-gqa"), random_ids(60)
    peak = least_bytes(dp.plan(ids, Tokens(), measure=False), "torch")
    free(peak - 1000)
    with pytest.raises(MemoryError, match="tokens: needs") as refused:
        dp.attribute(ids, Tokens())
    assert "a prompt of 30 tokens" in str(refused.value) and "state_dtype='bfloat16'" in str(refused.value)
    dp.attribute(ids[:30], Tokens())
    dp.attribute(ids, Tokens(), state_dtype="bfloat16")
    many = [random_ids(40, seed=i) for i in range(6)]
    free(least_bytes(dp.plan(many[:1], Tokens(), measure=False), "torch"))
    with pytest.raises(MemoryError, match="It fits with one of these 6 prompts at a time") as refused:
        dp.attribute(many, Tokens())
    for one in many:
        dp.attribute([one], Tokens())


def test_a_refusal_gives_two_pieces_of_advice_at_most_and_none_that_does_not_help(free, monkeypatch):
    dp, ids = build("llama-gqa"), random_ids(60)
    plans = []
    monkeypatch.setattr(depass_fast.planning.fit, "make_plan", lambda shape: plans.append(shape) or make_plan(shape))
    wide = least_bytes(dp.plan(ids, Tokens(), measure=False, state_dtype="float64"), "reference")
    free(wide - 1000)
    with pytest.raises(MemoryError) as refused:  # it would fit with a shorter prompt as well
        dp.attribute(ids, Tokens(), state_dtype="float64", backend="reference")
    advice = str(refused.value).split("It fits with ")[1]
    assert advice.startswith("backend='torch' (") and ", or with state_dtype='float32' (" in advice
    assert advice.count("with") == 1 and "a prompt of" not in advice and len(plans) == 3
    dp.attribute(ids, Tokens(), state_dtype="float64", backend="torch")
    dp.attribute(ids, Tokens(), state_dtype="float32", backend="reference")
    free(least_bytes(dp.plan(random_ids(20), Tokens(), measure=False), "torch"))  # half of 60 is too long
    with pytest.raises(MemoryError, match="Take a shorter prompt or a machine with more memory") as refused:
        dp.attribute(ids, Tokens())
    assert "It fits" not in str(refused.value)
    dp.attribute(random_ids(20), Tokens())


def test_the_workspace_is_what_there_is_room_for(free):
    dp, ids = build("llama-gqa"), random_ids(60)
    usual = dp.attribute(ids, Tokens(), 7)
    plan = dp.plan(ids, Tokens(), measure=False)
    free(least_bytes(plan, "torch"))
    tight = dp.attribute(ids, Tokens(), 7)
    assert tight.memory_budget <= usual.memory_budget and close(tight.scores, usual.scores)
    assert usual.memory_budget == 32 << 20
    free(None)
    assert dp.attribute(ids, Tokens(), 7, backend="reference").memory_budget is None


@pytest.fixture
def wide():
    """Few components and wide MLPs: what is held at the peak is held by the forward pass."""
    dp = DePass(build_model("llama", num_key_value_heads=2, intermediate_size=1024))
    shape = RunShape(dp.adapter, [64] * 1000, Modules(1), dp.options, None, False)
    estimate = make_plan(shape).of("torch")
    assert estimate.peak_bytes == estimate.forward_bytes and estimate.workspace_bytes > 8 << 20
    return dp, shape, estimate.forward_bytes


@pytest.mark.parametrize("budget", [None, 1 << 20])
def test_a_forward_pass_that_does_not_fit_is_refused_whatever_the_workspace(wide, free, budget):
    dp, shape, forward = wide
    options = dp.options.updated({"memory_budget": budget})
    run, shape = options.build(dp.adapter), replace(shape, options=options)
    assert least_bytes(make_plan(shape), "torch") == forward
    free(forward)
    fitted(run, shape)
    free(forward - 1)
    with pytest.raises(MemoryError, match="modules: needs .* are available"):
        fitted(run, shape)


def test_a_run_whose_peak_is_the_forward_pass_keeps_its_workspace(wide, free):
    dp, shape, forward = wide
    free(forward)
    run = dp.options.build(dp.adapter)
    assert fitted(run, shape) is run


def test_a_complete_state_drops_its_empty_rest_in_place():
    """A second state would be the peak of memory."""
    dp = build("llama-gqa")
    trace = dp.trace(random_ids(7))
    parts = (trace.resid(1) / 4)[:, None].repeat(1, 4, 1)
    state = start_state(dp, trace, Custom(1, parts))
    assert "rest" not in state.labels and torch.allclose(state.dense(), parts)
    assert state.rows.untyped_storage().nbytes() == 7 * (4 + 1) * 32 * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_trace_is_checked_without_wider_copies(dtype):
    """A CPU sums half precision in float32 by way of a copy that is twice as large."""

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
                seen.append((function, args[0].dtype, result.dtype, args[0].numel()))
            return result

    dp = build("llama-gqa", dtype)
    trace = dp.trace(random_ids(5))
    with Watch():
        check_finite(dp.adapter, trace)
    assert dtype in {given for _, given, _, _ in seen}
    assert not [one for one in seen if one[1:3] == (dtype, torch.float32) and one[3] > 1]


def test_a_model_on_several_devices_is_held_against_the_tightest(monkeypatch):
    """Each holds its layers' trace, and in its turn the state."""
    dp, kind, devices = build("llama-gqa"), Tokens(), [torch.device("cuda", i) for i in range(2)]
    alone = make_plan(RunShape(dp.adapter, [60], kind, dp.options))
    places = [devices[0], devices[1], devices[1]]
    monkeypatch.setattr(type(dp.adapter), "layer_device", lambda adapter, index: places[index])
    room = {devices[0]: 1 << 40, devices[1]: 1 << 30, torch.device("cpu"): 1 << 40}
    for module in (depass_fast.planning.planner, depass_fast.planning.fit):
        monkeypatch.setattr(module, "available", lambda device: room[device])
    plan = make_plan(RunShape(dp.adapter, [60], kind, dp.options))
    assert plan.device == "cuda:1" and plan.available_bytes == 1 << 30
    elsewhere = alone.trace_bytes // 3
    assert plan.of("torch").peak_bytes == alone.of("torch").peak_bytes - elsewhere
    monkeypatch.setattr(depass_fast.planning.fit, "_SMALL", 0)

    def fit(kind):
        shape = RunShape(dp.adapter, [60], kind, dp.options, None, False)
        return fitted(dp.options.build(dp.adapter), shape)

    fit(kind)
    room[devices[1]] = least_bytes(plan, "torch") - 1
    with pytest.raises(MemoryError, match="needs .* on cuda:1 and .* are available"):
        fit(kind)
    room[devices[1]], room[devices[0]] = 1 << 40, 1
    with pytest.raises(MemoryError, match="on cuda:0"):
        fit(kind)
    fit(Tokens(1))  # which the first device has no part in
