"""Choice of the backend: by argument, by the environment, or automatically. One that cannot run is refused, and why.

Nothing here needs a GPU, nor Triton: where a test is not about the backend itself, another one stands for it.
"""

import json
import logging
from dataclasses import replace

import pytest
import torch

from depass_fast import DePass, Heads, Neurons, Options, Tokens
from depass_fast import options as options_module
from depass_fast.allocation import RULES
from depass_fast.backends import (
    BACKENDS,
    VARIABLE,
    TorchBackend,
    backend_status,
    choose_backend,
    make_backend,
    selection,
)
from depass_fast.cli.main import main
from depass_fast.planning import fit as fitting
from depass_fast.planning import planner
from depass_fast.planning.shapes import RunShape
from depass_fast.runtime import log
from tests.support.devices import small_gpu
from tests.support.family_models import build_model
from tests.support.models import build, random_ids
from tests.support.states import close

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class StandIn(TorchBackend):
    name, streamable = "triton", False


@pytest.fixture(autouse=True)
def nothing_said_or_set(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(log, "_said", set())


@pytest.fixture
def triton(monkeypatch):
    """Says why triton cannot run, None for that it can; then a stand-in carries the states."""

    def make(name, compute_dtype=None, memory_budget=None, float16=False):
        given = compute_dtype, memory_budget
        return StandIn(*given) if name == "triton" else make_backend(name, *given, float16)

    def say(reason):
        monkeypatch.setattr(selection, "why_not_triton", lambda device, dtype: reason)
        for module in (options_module, fitting):
            monkeypatch.setattr(module, "make_backend", make)

    return say


# -- the choice -------------------------------------------------------------------------------------------------------


def test_auto_takes_triton_on_a_gpu_and_torch_elsewhere(triton):
    triton(None)
    assert choose_backend("auto", GPU).name == "triton" and choose_backend("auto", GPU).automatic
    assert choose_backend("auto", CPU).name == "torch"  # there it has nothing but its interpreter
    triton("no driver")
    chosen = choose_backend("auto", GPU)
    assert (chosen.name, chosen.why) == ("torch", "triton cannot run: no driver")


def test_triton_is_not_asked_for_in_vain(monkeypatch):
    """Its import takes time, and fixes whether it is interpreted."""
    monkeypatch.setattr(selection, "why_not_triton", None)
    assert [choose_backend(name, CPU).name for name in ("auto", "torch", "reference")] == [
        "torch",
        "torch",
        "reference",
    ]
    assert build("llama-gqa").attribute(random_ids(5), Tokens()).backend == "torch"


def test_what_is_missing_is_a_reason(monkeypatch):
    monkeypatch.setattr(selection.importlib.util, "find_spec", lambda name: None)
    assert backend_status(GPU)["triton"] == "Triton is not installed; pip install triton"
    assert tuple(backend_status(CPU)) == BACKENDS and backend_status(CPU)["torch"] is None


def test_auto_says_once_what_it_chose_and_why(caplog, triton):
    triton("no driver")
    with caplog.at_level(logging.INFO, "depass_fast"):
        for _ in range(2):
            selection.resolve("auto", CPU)
            selection.resolve("auto", GPU)
            selection.resolve("reference", CPU)
        build("llama-gqa").attribute(random_ids(5), Tokens())
    assert [record.getMessage() for record in caplog.records] == [
        "backend: torch on cpu: the fastest on a CPU",
        "backend: torch on cuda: triton cannot run: no driver",
    ]
    assert {record.levelno for record in caplog.records} == {logging.INFO}


def test_the_variable_stands_in_for_auto(monkeypatch):
    dp, ids = build("llama-gqa"), random_ids(5)
    monkeypatch.setenv(VARIABLE, "reference")
    assert dp.attribute(ids, Tokens()).backend == "reference"
    assert dp.attribute(ids, Tokens(), backend="torch").backend == "torch"
    assert DePass(dp.model, backend="torch").attribute(ids, Tokens()).backend == "torch"
    assert (
        not choose_backend("auto", CPU).automatic
        and choose_backend("auto", CPU).why == "DEPASS_FAST_BACKEND asks for it"
    )
    for nothing in ("", "auto"):
        monkeypatch.setenv(VARIABLE, nothing)
        assert dp.attribute(ids, Tokens()).backend == "torch"


def test_the_refusal_of_a_variable_names_it(monkeypatch, triton):
    triton("no driver")
    dp, ids = build("llama-gqa"), random_ids(5)
    monkeypatch.setattr(dp.adapter.model, "forward", None)  # no work
    monkeypatch.setenv(VARIABLE, "abacus")
    with pytest.raises(
        ValueError,
        match="^DEPASS_FAST_BACKEND: unknown backend 'abacus'. Available on cpu: 'auto', 'reference', 'torch'.",
    ):
        dp.attribute(ids, Tokens())
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match="^DEPASS_FAST_BACKEND: 'triton' cannot run: no driver. Available on cpu: 'a"):
        DePass(dp.model)


def test_what_is_asked_for_by_name_and_cannot_run_raises_before_any_work(monkeypatch, triton):
    triton("no driver")
    dp, ids = build("llama-gqa"), random_ids(5)
    monkeypatch.setattr(dp.adapter.model, "forward", None)
    message = "^backend: 'triton' cannot run: no driver. Available on cpu: 'auto', 'reference', 'torch'."
    for call in (
        lambda: DePass(dp.model, backend="triton"),
        lambda: dp.attribute(ids, Tokens(), backend="triton"),
        lambda: dp.decompose(ids, Tokens(), backend="triton"),
        lambda: dp.plan(ids, Tokens(), backend="triton"),
        lambda: dp.attribute(ids, Neurons(layers="all"), method="adjoint", backend="triton"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="^backend: unknown backend 'abacus'. Available on cpu"):
        dp.attribute(ids, Tokens(), backend="abacus")


def test_the_dtype_of_the_products_is_part_of_the_question(monkeypatch):
    asked = []
    monkeypatch.setattr(selection, "why_not_triton", lambda device, dtype: asked.append((device, dtype)) or "no")
    dp = build("llama-gqa")
    for dtype in ("float64", "bfloat16"):
        with pytest.raises(ValueError, match="cannot run: no"):
            dp.options.updated({"backend": "triton", "compute_dtype": dtype}).build(dp.adapter)
    assert set(asked) == {(CPU, torch.float64), (CPU, torch.float32)}


# -- what the choice means --------------------------------------------------------------------------------------------


def test_triton_by_name_is_what_runs(triton):
    triton(None)
    dp, ids = build("llama-gqa"), random_ids(7)
    result = dp.attribute(ids, Tokens(), 7, backend="triton", memory_budget=4000)
    assert (result.backend, result.memory_budget) == ("triton", 4000)
    assert close(result.scores, dp.attribute(ids, Tokens(), 7, backend="reference").scores)
    found = dp.attribute(ids, Heads(layers="all"), 7, backend="triton")
    assert found.backend == "triton" and found.layers == [0, 1, 2]


def test_streaming_and_focus_are_the_torch_backends(monkeypatch, triton):
    triton(None)
    dp, ids = build("llama-gqa"), random_ids(7)
    with pytest.raises(ValueError, match="stream: the triton backend does not stream; take backend='torch'"):
        dp.attribute(ids, Tokens(), backend="triton", stream=True)
    trace = dp.trace(ids)
    focus = dp.focus(trace, Tokens(), [2], backend="triton")
    assert torch.equal(focus.entering(3), dp.focus(trace, Tokens(), [2], backend="torch").entering(3))
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match="stream: the triton backend does not stream"):
        dp.attribute(ids, Tokens(), stream=True)
    assert dp.attribute(ids, Tokens(), stream=True, backend="torch").backend == "torch, streamed"


def test_the_workspace_is_fitted_as_torchs_is(monkeypatch, triton):
    triton(None)
    dp, ids = build("llama-gqa"), random_ids(60)
    plan = dp.plan(ids, Tokens(), measure=False)
    monkeypatch.setattr(fitting, "_LEAST_WORKSPACE", 1 << 12)
    for module in (fitting, planner):
        monkeypatch.setattr(module, "available", lambda device: fitting.least_bytes(plan, "triton"))
    result = dp.attribute(ids, Tokens(), 7, backend="triton")
    assert result.backend == "triton" and result.memory_budget < 32 << 20


def test_without_room_auto_streams_and_triton_by_name_is_refused(monkeypatch, triton):
    triton(None)
    monkeypatch.setattr(fitting, "_LEAST_WORKSPACE", 1 << 12)  # of so small a model the workspace would be all
    lengths, kind, adapter = [60], Tokens(), build("llama-gqa").adapter
    placed = small_gpu(monkeypatch, lengths, kind)

    def chosen(**given):
        given = Options(**given)
        run = replace(Options().build(adapter), backend=StandIn())
        return fitting.fitted(run, RunShape(placed, lengths, kind, given, None, False))

    assert chosen().backend.name == "torch, streamed"
    with pytest.raises(MemoryError, match=r"It fits with stream=True"):
        chosen(stream=False)
    for stream in ("auto", False):
        with pytest.raises(MemoryError, match=r"It fits with backend='torch', stream=True"):
            chosen(backend="triton", stream=stream)


def test_a_plan_lists_triton_where_it_can_run(triton):
    dp = build("llama-gqa")
    triton(None)
    plan = dp.plan(12, Tokens())
    assert plan.of("triton").seconds is None  # on a CPU it is interpreted: that time is nobody's
    assert plan.of("torch").seconds > 0 and "triton " in str(plan)
    layers = dp.plan(12, Heads(layers="all"))
    one = dp.plan(12, Heads(0))
    assert layers.of("triton").peak_bytes > one.of("triton").peak_bytes  # states are held together
    triton("no driver")
    with pytest.raises(KeyError, match="no backend 'triton' in this plan; it has torch, torch, streamed, reference"):
        dp.plan(12, Tokens(), measure=False).of("triton")


# -- the command line -------------------------------------------------------------------------------------------------


def test_doctor_shows_every_backend_the_variable_and_the_choice(capsys, monkeypatch, triton):
    triton("no driver")

    def doctor(*flags):
        assert main(["doctor", *flags]) == 0
        return capsys.readouterr().out

    found = json.loads(doctor("--json"))
    assert found["backends"] == {"reference": "ok", "torch": "ok", "triton": "no driver"}
    assert found["environment"] == {VARIABLE: None} and VARIABLE not in doctor()
    assert found["auto"]["backend"] == "torch" and found["auto"]["why"]
    monkeypatch.setenv(VARIABLE, "reference")
    assert json.loads(doctor("--json"))["auto"]["backend"] == "reference"
    text = doctor()
    assert "DEPASS_FAST_BACKEND  reference" in text and "reference (DEPASS_FAST_BACKEND asks for it)" in text
    monkeypatch.setenv(VARIABLE, "triton")
    assert json.loads(doctor("--json"))["auto"]["backend"] is None
    assert "none (DEPASS_FAST_BACKEND: 'triton' cannot run: no driver." in doctor()


def test_errors_name_the_flag_or_the_variable(capsys, monkeypatch, triton):
    triton("no driver")
    arguments = ["attribute", "--model", "demo", "--device", "cpu", "--prompt", "Nyria", "--components", "tokens"]
    assert main([*arguments, "--backend", "triton"]) == 2
    assert "error: --backend: 'triton' cannot run: no driver. Available on cpu:" in capsys.readouterr().err
    monkeypatch.setenv(VARIABLE, "abacus")
    assert main(arguments) == 2
    assert "error: DEPASS_FAST_BACKEND: unknown backend 'abacus'" in capsys.readouterr().err
    assert main([*arguments, "--backend", "reference", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "reference"


# -- the backend itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_triton_agrees_with_the_reference(rule):
    if reason := backend_status(CPU, torch.float32)["triton"]:
        pytest.skip(reason)
    dp, ids = build("qwen2"), random_ids(7)
    trace = dp.trace(ids)
    for kind in (Tokens(), Heads(0), Neurons(1)):
        oracle = dp.decompose(trace, kind, allocation=rule, backend="reference").dense()
        assert close(dp.decompose(trace, kind, allocation=rule, backend="triton").dense(), oracle), kind


def even(gates, temperature):
    """A rule of one's own."""
    return gates.alive[..., None].to(gates.values).expand_as(gates.values)


@pytest.mark.parametrize(
    ("name", "changes", "kind", "options", "said"),
    [
        ("llama", {"head_dim": 256}, Tokens(), {}, "leaves the attention to torch: it has no kernel for heads of 1024"),
        (
            "olmo",
            {"clip_qkv": 0.1},
            Tokens(),
            {},
            "leaves the attention to torch: it has no kernel for values that the",
        ),
        ("llama", {}, Tokens(), {"allocation": even}, "leaves the allocation to torch"),
        ("llama", {}, Tokens(), {}, None),
    ],
)
def test_what_triton_leaves_to_torch_is_said_once(name, changes, kind, options, said, caplog):
    dp = DePass(build_model(name, num_key_value_heads=2, **changes), backend="triton")
    with caplog.at_level(logging.INFO, "depass_fast"):
        for _ in range(2):
            dp.attribute(random_ids(3), kind, 5, **options)
    ours = [record.getMessage() for record in caplog.records if record.name == "depass_fast"]
    assert [said in message for message in ours] == ([] if said is None else [True])


def test_the_command_line_says_what_was_chosen(capsys):
    assert main(["attribute", "--model", "demo", "--prompt", "Mary and John", "--components", "tokens"]) == 0
    assert capsys.readouterr().err == "backend: torch on cpu: the fastest on a CPU\n"
