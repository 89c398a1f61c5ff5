"""The triton backend's workspace and tables, and a step that runs out of memory."""

import os
from types import SimpleNamespace

import pytest
import torch

from depass_fast import DePass, Heads, Neurons, Tokens
from depass_fast.allocation import Allocation
from depass_fast.backends import choose_backend
from depass_fast.backends.reference import ReferenceBackend
from depass_fast.backends.torch.backend import TorchBackend
from depass_fast.backends.triton import backend, machine
from depass_fast.cli.doctor import report
from depass_fast.state.state import ComponentState
from tests.support.family_models import build_model
from tests.support.models import build, random_ids
from tests.support.states import close
from tests.support.steps import carried


@pytest.fixture(scope="module")
def wide():
    """A model whose neurons come in several blocks where the workspace is small."""
    return DePass(build_model("llama", intermediate_size=200), backend="triton")


@pytest.mark.parametrize(
    "at", [1, pytest.param(2, marks=pytest.mark.thorough), 3, pytest.param(7, marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize("name", ["accumulate", "allocate"])
def test_running_out_of_memory_inside_a_step_changes_nothing(wide, name, at, monkeypatch):
    """Memory may run out between two blocks of neurons of a chunk, when the first has been added to the state."""
    trace = wide.trace(random_ids(4))
    expected = wide.decompose(trace, Heads(0), memory_budget=4_096).dense()
    ordinary, count = getattr(backend, name), iter(range(1, 10_000))

    def scarce(*args, **kwargs):
        if next(count) == at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return ordinary(*args, **kwargs)

    monkeypatch.setattr(backend, name, scarce)
    with pytest.warns(RuntimeWarning, match="results do not change"):
        found = wide.decompose(trace, Heads(0), memory_budget=4_096).dense()
    assert close(found, expected)


@pytest.mark.parametrize("budget", [30_000, pytest.param(100_000, marks=pytest.mark.thorough)])
def test_the_workspace_stays_within_its_bytes(wide, budget):
    trace = wide.trace([random_ids(7), random_ids(3)])
    for kind in (Tokens(), Heads(0)):
        run = wide.options.updated({"memory_budget": budget}).build(wide.adapter)
        carried(wide, trace, wide.start(trace, kind), 3, run)
        held = sum(b.numel() * b.element_size() for b in run.backend._workspace._buffers.values())
        assert held <= budget + 1024, (kind, held)  # whole lines of 256 bytes


def test_layers_with_other_groups_share_no_tables():
    """One layout, and attention with one, two and four queries per key: every tile of each is done."""
    ids, found, state = random_ids(20), backend.TritonBackend(), None
    for kv in (4, 2, 1):
        dp = DePass(build_model("llama", num_key_value_heads=kv))
        trace = dp.trace(ids)
        state = state or dp.start(trace, Tokens())
        layer, record = dp.adapter.layer(0), trace.layers[0]
        one, other = (ComponentState(state.rows.clone(), state.layout, 0) for _ in range(2))
        with torch.no_grad():
            fast = found.aggregate_ov(one, layer.attention, record.attention)
            plain = ReferenceBackend().aggregate_ov(other, layer.attention, record.attention)
        assert close(fast.rows, plain.rows), kv


@pytest.mark.parametrize("budget", [4_096, None])
@pytest.mark.parametrize("clipped", [False, True], ids=["kernel", "torch"])
def test_the_attention_of_the_extras_leaves_the_named_components_alone(budget, clipped):
    """The named components have been carried as products before. A kernel does it; torch where values are clipped."""
    changes = {"clip_qkv": 0.1} if clipped else {"attention_bias": True}
    dp = DePass(build_model("olmo" if clipped else "llama", **changes))
    trace = dp.trace([random_ids(6), random_ids(4, seed=2)])
    layer, record = dp.adapter.layer(1), trace.layers[1]
    start = dp.carry(trace, dp.start(trace, Heads(0)), 1)
    found = []
    for kind in (backend.TritonBackend, TorchBackend):
        state = ComponentState(start.rows.clone(), start.layout, 1)
        with torch.no_grad():
            after = kind(None, budget)._aggregate_everywhere(state, layer.attention, record.attention, extras_only=True)
        found.append([after.block(prompt) for prompt in range(2)])
    for prompt in range(2):
        extras, before = len(start.layout.components[prompt].extras), start.block(prompt)
        assert extras and close(found[0][prompt], found[1][prompt])
        assert torch.equal(found[0][prompt][:, extras:], before[:, extras:])
        assert not torch.equal(found[0][prompt][:, :extras], before[:, :extras])


def test_the_temperature_is_what_was_asked_for():
    dp = build("llama-gqa")
    trace = dp.trace(random_ids(4))
    found, oracle = (
        dp.decompose(trace, Tokens(), end=1, temperature=0.7, backend=name).dense() for name in ("triton", "reference")
    )
    assert close(found, oracle)


def test_heads_that_are_too_wide_in_float32_are_as_right():
    """256 numbers of four bytes are more than a tile holds."""
    dp = DePass(build_model("llama", head_dim=256, num_key_value_heads=2))
    trace = dp.trace(random_ids(5))
    found, oracle = (dp.decompose(trace, Tokens(), end=1, backend=name).dense() for name in ("triton", "reference"))
    assert close(found, oracle)


@pytest.mark.parametrize("compute", ["float32", "float16", "bfloat16"])
def test_a_model_in_bfloat16_computes_in_any_dtype(compute):
    dp = build("llama-gqa", torch.bfloat16)
    trace = dp.trace(random_ids(6))
    oracle = dp.attribute(trace, Tokens(), 3, backend="reference").scores
    found = dp.attribute(trace, Tokens(), 3, backend="triton", compute_dtype=compute).scores
    assert close(found, oracle, 1e-5 if compute == "float32" else 0.1)


def test_a_float64_state_is_refused_and_not_cut_to_float32():
    with pytest.raises(ValueError, match="x: expected float32 or float16 or bfloat16 .*; got float64"):
        backend.rows.add_rows(torch.zeros(2, 8, dtype=torch.float64), None, torch.zeros(2, 8))
    dp = build("llama-gqa")
    with pytest.raises(ValueError, match="cannot run: its kernels compute in float32 at most"):
        dp.attribute(random_ids(4), Tokens(), 3, backend="triton", state_dtype="float64")
    wide = build("llama-gqa", torch.float64)  # whose trace is
    with pytest.raises(ValueError, match="cannot run: its kernels compute in float32 at most"):
        wide.attribute(random_ids(4), Tokens(), 3, backend="triton", state_dtype="float32", compute_dtype="float32")


@torch.no_grad()
@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [Tokens(1), Heads(0), Neurons(0)], ids=["tokens", "heads", "neurons"])
def test_a_step_is_no_further_from_float64_than_the_torch_backend(kind, compute):
    """Increments of attention and MLP, with products in half precision and the state in float32; several models."""
    errors = {"torch": torch.zeros(2), "triton": torch.zeros(2)}
    for seed in range(3):
        dp = build("llama-gqa", seed=seed)
        trace = dp.trace(random_ids(8, seed=seed))
        state, layer, record = dp.start(trace, kind), dp.adapter.layer(1), trace.layers[1]

        def steps(backend, dtype, state=state, layer=layer, record=record):
            def fresh():
                return ComponentState(state.rows.to(dtype, copy=True), state.layout, 1)

            yield backend.aggregate_ov(fresh(), layer.attention, record.attention).rows.double() - state.rows
            rule = Allocation("softmax", 0.1)
            yield backend.allocate_mlp(fresh(), layer.mlps[0], record.mlps[0], rule).rows.double() - state.rows

        exact = list(steps(ReferenceBackend(), torch.float64))
        for name, made in (("torch", TorchBackend(compute)), ("triton", backend.TritonBackend(compute))):
            pairs = zip(steps(made, torch.float32), exact, strict=True)
            errors[name] += torch.tensor([float((got - right).norm() / right.norm()) for got, right in pairs])
    assert (errors["triton"] <= 1.02 * errors["torch"]).all(), errors


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU and no compiler, and how it gets one: (the name of a program, or what CC holds)."""
    monkeypatch.setattr(machine, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    def install(program):
        (tmp_path / program).write_text("#!/bin/sh\n")
        os.chmod(tmp_path / program, 0o755)

    return install


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_gpu_without_a_c_compiler_is_a_reason(compiler, gpu):
    device, reason = torch.device("cuda"), "Triton needs a C compiler to launch its kernels; install gcc or clang"
    assert machine.why_not(device).startswith(reason)
    assert choose_backend("auto", device).name == "torch" and reason in choose_backend("auto", device).why
    with pytest.raises(ValueError, match=f"backend: 'triton' cannot run: {reason}"):
        choose_backend("triton", device)
    gpu(compiler)
    assert machine.why_not(device) is None and choose_backend("auto", device).name == "triton"


def test_a_compiler_may_be_named(gpu, monkeypatch):
    device = torch.device("cuda")
    for named in ("gcc-13", "", "ccache gcc"):  # what Triton runs is the whole of it
        monkeypatch.setenv("CC", named)
        assert (
            machine.why_not(device) == f"Triton needs a C compiler, and the one that CC names, {named!r}, is not there"
        )
    gpu("gcc-13")
    monkeypatch.setenv("CC", "gcc-13")
    assert machine.why_not(device) is None
    monkeypatch.delenv("CC")
    monkeypatch.setattr(machine.knobs.build, "impl", lambda *arguments: "module.so", raising=False)
    assert machine.why_not(device) is None


def test_the_doctor_misses_the_compiler_and_the_interpreter_does_not(gpu, monkeypatch):
    monkeypatch.setattr("depass_fast.cli.doctor.devices", list)
    assert report()["backends"]["triton"].startswith("Triton needs a C compiler")
    monkeypatch.setattr(machine, "interpreted", lambda: True)
    assert machine.why_not(torch.device("cpu")) is None
