"""Memory of runs on a GPU, in the shapes of real models, counted on the meta device (bench/memory/meta.py)."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.memory import meta
from bench.memory.meta import Counted, CountedRun, cases, count, run
from depass_fast.adapters.recurrent import knows_recurrences

# the rest are variations of these; python -m bench.memory.meta runs them all
QUICK = [case for case in cases() if case.lengths != (2048,) and case.model not in ("llama-3.1-8b", "qwen2-7b")]
QUICK = [case for case in QUICK if case.memory_budget != 128 << 20 or case.components == "neurons"]
MANY = [case for case in QUICK if len(case.lengths) == 64 and case.call == "ledger"]
MANY += [case for case in QUICK if case.memory_budget == 128 << 20 and case.backend == "torch"]
QUICK = [pytest.param(case, marks=pytest.mark.thorough) if case in MANY else case for case in QUICK]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.backend}-{case.model}-{case.name}")
def test_the_peak_is_the_planned_one(case):
    row = run(case)
    assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=meta.GOAL)
    if case.memory_budget is None and case.backend == "triton" and case.model != "pythia-6.9b":  # it copies the state
        assert row["measured_bytes"] - row["state_bytes"] - row["trace_bytes"] < 2e9


@pytest.mark.parametrize("workload", ["neurons of layer 0, N=20", "tokens, N=128", "tokens, N=512"])
def test_no_more_is_held_than_a_gpu_was_measured_to_hold(workload):
    recorded = json.loads((Path(__file__).parents[2] / "bench/results/gpu-h200.json").read_text())["rows"]
    kind, length = workload.split(", N=")
    (peak,) = (
        row["peak_bytes"]
        for row in recorded
        if (row["workload"], row["model"], row["provider"]) == (workload, "llama-2-7b", "triton")
    )
    counted = run(CountedRun("llama-2-7b", kind.split()[0], (int(length),), "triton", layers=32))["measured_bytes"]
    assert 0.7 * peak < counted <= peak


def test_what_is_let_go_is_no_longer_counted():
    model = torch.nn.Linear(8, 8, device="meta")
    with Counted(model) as counted:
        x = torch.empty(100, 8, device="meta")
        y = model(x)  # 3,200 bytes each
        model.weight.T.contiguous()  # and let go
        del x, y
        z = torch.empty(10, device="meta")
        z[2:].mul_(2)  # a view is no storage of its own
    assert counted.peak == 2 * 3200 + 256 and counted.now == 40
    assert counted.operations == 3  # addmm, clone, mul_


def test_what_a_layer_of_a_sweep_adds_to_what_is_launched():
    """Its new tables travel in one copy each time; with the model's own forward pass left out of it."""

    def per_layer(components):
        few, more = (
            run(CountedRun("llama-2-7b", components, (20,), "triton", layers=n))["operations"] for n in (6, 10)
        )
        return (more - few) / 4

    assert per_layer("heads of all layers") - per_layer("tokens") <= 18.5


@pytest.mark.parametrize(("model", "most"), [("llama-2-7b", 110), ("qwen2-7b", 118)])
def test_what_a_layer_of_the_adjoint_sweep_launches(model, most):
    """Twice there and back, with the start, the search for loud ones and the model's forward pass, in a second call."""
    few, more = (
        count(CountedRun(model, "all neurons", (20,), "torch", layers=n, refine=10), again=True)[1].operations
        for n in (4, 8)
    )
    assert (more - few) / 4 <= most


@pytest.mark.skipif(not knows_recurrences(), reason="the installed transformers is too old")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("components", "length"), [("tokens", 300), ("neurons", 20)])
def test_attention_without_a_kernel_has_buffers_beside_the_arena(components, length, backend):
    """Gemma 4: norms of values, and values of an earlier layer, which a copy of the state is kept for."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 128, "global_head_dim": 128}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "num_kv_shared_layers": 2}
    per_layer = {"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 512}
    config = AutoConfig.for_model(
        "gemma4_text",
        vocab_size=512,
        num_hidden_layers=4,
        layer_types=kinds,
        pad_token_id=0,
        **shape,
        **heads,
        **per_layer,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval().bfloat16()
    with mock.patch.object(meta, "build_model", lambda *about, **how: model):
        row = run(CountedRun("llama-2-7b", components, (length,), backend))
    assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=meta.GOAL)
