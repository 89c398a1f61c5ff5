"""The planner's peaks of memory beside measured ones: ``python -m bench.memory.plan [--out FILE.json] [--quick]``.

Each case of a grid of shapes is measured in a process of its own: the high-water mark of the resident set less the
resident set with the model loaded (see :mod:`bench.core.peak`).

Adjoint sweeps and ways back make and free blocks of many sizes. The C library keeps freed blocks below 32 MiB, in
pieces that serve no larger ones, and their number differs from run to run. So their allocations are measured with every
freed block given back (``MALLOC_MMAP_THRESHOLD_``), and that is compared with the prediction; the resident set without
this setting stands beside both. States that stream are measured in the same way: their prediction adds the host's part
to the device's, which are one memory here; and exact runs of this year's models (`today`), whose own code of a
recurrence makes blocks of many sizes. Of these the second call is measured: the first also compiles kernels of
products, which the library keeps for every shape (up to 80 MiB on a CPU that is AMD's).

The table is printed; ``python -m bench.report`` reads the JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any, cast
from unittest import mock

import torch

from depass_fast import ComponentKind, Custom, DePass, Heads, Modules, Neurons, Tokens
from depass_fast.adjoint.sweep import Sweep
from depass_fast.options import Adjoint, LinearRuleName, RuleName
from depass_fast.planning.gemm_rate import gemm_rate
from depass_fast.planning.planner import make_plan
from depass_fast.planning.shapes import RunShape
from depass_fast.results.estimate import ApproximationWarning

from ..core.cli import command, writable
from ..core.models import family_model
from ..core.peak import measurable, measured
from ..core.results import ROOT, write_results
from .today import CONFIGS

GOAL = 0.15


@dataclass(frozen=True)
class PlannedRun:
    """A model by its config, prompts by their lengths, components of a layer, and dtypes."""

    name: str
    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    components: str
    lengths: tuple[int, ...]
    layer: int = 0
    dtype: str = "float32"
    state_dtype: str = "float32"
    call: str = "attribute"
    memory_budget: int | None = None
    method: str = "exact"
    every: bool = False  # neurons of all layers
    refine: int = 0
    sample: int = 0
    stream: bool = False
    rule: RuleName = "softmax"
    scale: float = 0.2  # of the weights: the number of loud neurons depends on it
    targets: int = 1


def _llama(name: str, hidden: int, intermediate: int, components: str, *lengths: int, **more: object) -> PlannedRun:
    heads = more.get("heads", hidden // 64)
    shape = {"model_type": "llama", "layers": 3, "heads": heads, "kv_heads": heads, **more}
    return PlannedRun(name, hidden=hidden, intermediate=intermediate, components=components, lengths=lengths, **shape)


FULL = [
    _llama("tokens", 1024, 1024, "tokens", 300),
    _llama("tokens, long", 512, 1024, "tokens", 900, layers=2),
    _llama("tokens, wide MLP", 512, 4096, "tokens", 500, layers=2),
    _llama("tokens, grouped heads", 2048, 1024, "tokens", 250, kv_heads=4, layers=2),
    _llama("tokens, decompose", 1024, 1024, "tokens", 400, call="decompose", layers=2),
    _llama("tokens, half state", 1024, 1024, "tokens", 500, state_dtype="bfloat16", layers=2),
    _llama("tokens, half model", 1024, 1024, "tokens", 400, dtype="bfloat16", layers=2),
    _llama("tokens, 512M of workspace", 1024, 1024, "tokens", 400, memory_budget=512 << 20, layers=2),
    _llama("tokens of 8 prompts", 1024, 1024, "tokens", 40, 80, 120, 160, 200, 240, 60, 100, layers=2),
    _llama("neurons", 512, 2816, "neurons", 60, layers=2),
    _llama("neurons, short", 1024, 4096, "neurons", 16, layers=3),
    _llama("neurons, decompose", 512, 2816, "neurons", 100, layers=2, call="decompose"),
    _llama("heads", 2048, 2048, "heads", 1500, layers=2, call="decompose"),
    _llama("modules", 2048, 4096, "modules", 4000, layers=2),
    _llama("custom", 1024, 2048, "custom", 1500, layers=2, call="decompose"),
    _llama("qwen2: biases", 1024, 1024, "tokens", 300, model_type="qwen2", kv_heads=4, layers=2),
    _llama("gpt_neox: parallel", 1024, 1024, "tokens", 300, model_type="gpt_neox", layers=2),
    _llama("gpt2", 1024, 2048, "tokens", 300, model_type="gpt2", layers=2),
    _llama("gemma2: output norms", 1024, 2048, "tokens", 300, model_type="gemma2", layers=2),
    _llama("mixtral: experts", 1024, 1024, "tokens", 250, model_type="mixtral", layers=2),
    _llama("half: tokens", 1024, 1024, "tokens", 300, rule="half"),
    _llama("half: neurons", 512, 2816, "neurons", 60, layers=2, rule="half"),
    _llama("shapley: tokens, wide MLP", 512, 4096, "tokens", 500, layers=2, rule="shapley"),
    _llama("shapley: neurons", 1024, 4096, "neurons", 16, layers=3, rule="shapley"),
    _llama("shapley: modules", 2048, 4096, "modules", 4000, layers=2, rule="shapley"),
    _llama("shapley: half model", 1024, 1024, "tokens", 400, dtype="bfloat16", layers=2, rule="shapley"),
    _llama("shapley: experts", 1024, 1024, "tokens", 250, model_type="mixtral", layers=2, rule="shapley"),
    _llama("shapley: ungated", 1024, 2048, "tokens", 300, model_type="gpt2", layers=2, rule="shapley"),
    _llama("shapley: streamed tokens", 1024, 2816, "tokens", 128, stream=True, rule="shapley"),
    _llama("half: streamed heads", 1024, 2816, "heads", 200, stream=True, rule="half"),
    _llama("streamed tokens", 512, 1408, "tokens", 256, stream=True),
    _llama("streamed tokens, wide", 1024, 2816, "tokens", 128, stream=True),
    _llama("streamed neurons", 512, 1408, "neurons", 24, stream=True),
    _llama("streamed heads", 1024, 2816, "heads", 200, stream=True),
]
_SMALL, _SHORT, _LONG = (512, 2816, "neurons", 60), (1024, 4096, "neurons", 16), (512, 2816, "neurons", 100)
ADJOINT = [
    *(
        _llama(f"adjoint, {name}", *shape, method="adjoint", refine=k, sample=64 if k else 0, **more)
        for k in (0, 64, 1000)
        for name, shape, more in (
            ("one layer", _SMALL, {}),
            ("all layers", _LONG, {"every": True, "layers": 6}),
            ("all layers, short", _SHORT, {"every": True}),
        )
    ),
    *(
        _llama(f"adjoint, {name}", *_SMALL, method="adjoint", refine=64, sample=64, **more)
        for name, more in (
            ("small weights", {"scale": 0.02}),
            ("64M of workspace", {"every": True, "memory_budget": 64 << 20}),
            ("half model", {"every": True, "dtype": "bfloat16"}),
            ("qwen2: biases", {"every": True, "model_type": "qwen2", "kv_heads": 4}),
            ("gpt_neox: parallel", {"every": True, "model_type": "gpt_neox"}),
        )
    ),
    _llama("adjoint, 2,000 tokens", 512, 1024, "neurons", 2000, method="adjoint", refine=0, sample=0, scale=0.02),
]
_DEEP: tuple[Any, ...] = (512, 1376, "tokens", 2048)
_PROMPTS: tuple[Any, ...] = (512, 1376, "tokens", *(100 + 10 * i for i in range(16)))
_LONGER: tuple[Any, ...] = (512, 1376, "tokens", 4096)
_SHORT_PROMPTS: tuple[Any, ...] = (1024, 2816, "tokens", *[20] * 16)
_LEDGER = {"method": "linear", "call": "ledger"}
_SHAPLEY = {"heads": 4, "layers": 2, "rule": "shapley"}
LINEAR = [
    *(
        _llama(f"{call}, {name}", *shape, method="linear", call=call, **{**_SHAPLEY, **more})
        for call in ("ledger", "attribute")
        for name, shape, more in (
            ("shapley", _DEEP, {}),
            ("half", _DEEP, {"rule": "half"}),
            ("taylor", _DEEP, {"rule": "taylor"}),
            ("3 targets", _DEEP, {"targets": 3}),
            ("4,096 tokens", _LONGER, {}),
            ("16 prompts", _PROMPTS, {}),
            ("16 prompts of 20 tokens", _SHORT_PROMPTS, {"layers": 6}),
            ("64M of workspace", _DEEP, {"memory_budget": 64 << 20}),
            ("half model", _DEEP, {"dtype": "bfloat16"}),
        )
    ),
    _llama("attribute, all neurons", 512, 2816, "neurons", 100, method="linear", rule="half", every=True, layers=12),
    _llama("ledger, qwen2: biases", *_DEEP, method="linear", rule="half", call="ledger", model_type="qwen2", layers=2),
    _llama("ledger, gpt_neox: parallel", *_DEEP, method="linear", rule="half", call="ledger", model_type="gpt_neox"),
    _llama("ledger, gpt2", *_DEEP, method="linear", rule="shapley", call="ledger", model_type="gpt2"),
    _llama("ledger, gemma2: output norms", 1024, 2048, "tokens", 300, **_SHAPLEY, **_LEDGER, model_type="gemma2"),
]
_TOGETHER = ("qwen3_5_text", "kimi_linear", "jamba", "xlstm", "diffllama")  # of 16 prompts, too
_HALF_LEDGER = {**_LEDGER, "rule": "half"}
TODAY = [
    _llama(f"today, {call}{name}: {components}", 1024, 1024, components, *lengths, model_type=name, **more)
    for name in (*CONFIGS, "lfm2", "diffllama")
    for call, components, lengths, more in (
        ("", "tokens", (300,), {}),
        ("ledger, ", "tokens", (1024,), _HALF_LEDGER),
        *([("ledger of 16, ", "tokens", (64,) * 16, _HALF_LEDGER)] if name in _TOGETHER else []),
    )
]
QUICK = [
    _llama("tokens", 256, 256, "tokens", 150),
    _llama("neurons", 128, 1024, "neurons", 40),
    _llama("neurons, shapley", 128, 1024, "neurons", 40, rule="shapley"),
    _llama("adjoint", 128, 1024, "neurons", 40, method="adjoint", refine=8, sample=8),
    _llama("ledger", 128, 1024, "tokens", 200, method="linear", rule="shapley", call="ledger"),
]


def build(case: PlannedRun) -> DePass:
    shape = {
        "hidden_size": case.hidden,
        "intermediate_size": case.intermediate,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "max_position_embeddings": 8192,
        "initializer_range": case.scale,
    }
    if case.model_type not in ("gpt2", "gpt_neox"):
        shape |= {"num_key_value_heads": case.kv_heads, "head_dim": case.hidden // case.heads}
    if case.model_type == "gpt2":
        shape["n_inner"] = shape.pop("intermediate_size")
    shape |= CONFIGS.get(case.model_type, {})
    if case.model_type == "mixtral":
        shape["num_local_experts"] = 4
    return DePass(family_model(case.model_type, **shape).to(getattr(torch, case.dtype)))


def kind(case: PlannedRun) -> ComponentKind:
    named = {"tokens": Tokens, "neurons": Neurons, "heads": Heads, "modules": Modules}
    if case.components == "custom":
        return Custom(case.layer, torch.randn(case.lengths[0], 64, case.hidden))
    return Neurons(layers="all") if case.every else named[case.components](case.layer)


def run(case: PlannedRun) -> dict:
    """Return the prediction beside the measured peak, in this process."""
    torch.set_num_threads(1)
    dp, components = build(case), kind(case)
    options = {"state_dtype": case.state_dtype, "memory_budget": case.memory_budget, "allocation": case.rule}
    make = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 64, (n,), generator=make) for n in case.lengths]
    dp.attribute([1, 2, 3, 4], Tokens(), target=7)  # thread pools, buffers of the GEMM library
    if case.method == "adjoint":
        return {**asdict(case), **run_adjoint(case, dp, components, prompts, options)}
    if case.method == "linear":
        return {**asdict(case), **run_linear(case, dp, components, prompts, options)}
    options["stream"] = case.stream
    dp.attribute([1, 2, 3, 4], Tokens(), target=7, stream=case.stream)
    plan = dp.plan(prompts, components, method="exact", measure=False, **options)
    estimate = plan.of("torch, streamed" if case.stream else "torch")
    if case in TODAY:
        dp.attribute(prompts, components, 7, method="exact", **options)
    if case.call == "decompose":
        peak = measured(lambda: dp.decompose(prompts, components, **options))
    else:
        peak = measured(lambda: dp.attribute(prompts, components, 7, method="exact", **options))
    return {**asdict(case), "predicted_bytes": estimate.peak_bytes + estimate.host_bytes, "measured_bytes": peak}


def run_adjoint(case: PlannedRun, dp: DePass, components: ComponentKind, prompts: list, options: dict) -> dict:
    """Return the same for a sweep. Its plan is told the number of loud components, which no config tells."""
    method = Adjoint(refine=case.refine, sample=case.sample)
    warnings.simplefilter("ignore", ApproximationWarning)
    dp.attribute([1, 2, 3, 4], Neurons(0), 7, method=Adjoint(refine=2, sample=2))
    found, find_loud = [], Sweep._loud

    def recording(sweep: Sweep) -> Any:
        found.append(find_loud(sweep))
        return found[-1]

    with mock.patch.object(Sweep, "_loud", recording):
        began = time.perf_counter()
        peak = measured(lambda: dp.attribute(prompts, components, 7, method=method, **options))
        seconds = time.perf_counter() - began
    loud = max(len(one.index) for starts in found for one in starts)
    rate, _ = gemm_rate(dp.adapter.device, torch.float32)
    lengths = [len(prompt) for prompt in prompts]
    shape = RunShape(dp.adapter, lengths, components, method=method)
    plan = make_plan(replace(shape, options=dp.options.updated(options)), loud=loud)
    timed = make_plan(shape, loud=loud, gemm_flops=rate)
    times = {"seconds": seconds, "predicted_seconds": timed.of().seconds}
    return {"loud": loud, "predicted_bytes": plan.of().peak_bytes, "measured_bytes": peak, **times}


def run_linear(case: PlannedRun, dp: DePass, components: ComponentKind, prompts: list, options: dict) -> dict:
    """Return the same for a way back under a linear rule: for a ledger, or for the components of an attribution."""
    targets = list(range(7, 7 + case.targets))
    workspace = {name: value for name, value in options.items() if name != "allocation"}

    def call(prompts: list) -> object:
        if case.call == "ledger":
            return dp.ledger(prompts, targets, rule=cast(LinearRuleName, case.rule), **workspace)
        return dp.attribute(prompts, components, targets, method="adjoint", **options)

    call([[1, 2, 3, 4]])
    given = {"method": "adjoint", "n_targets": case.targets, **options}
    asked = "ledger" if case.call == "ledger" else components
    plan, timed = (dp.plan(prompts, asked, measure=measure, **given) for measure in (False, True))
    began = time.perf_counter()
    peak = measured(lambda: call(prompts))
    times = {"seconds": time.perf_counter() - began, "predicted_seconds": timed.of().seconds}
    return {"predicted_bytes": plan.of().peak_bytes, "measured_bytes": peak, **times}


def line(row: dict) -> str:
    predicted, found = row["predicted_bytes"], row["measured_bytes"]
    sizes = f"{predicted / 2**20:8.0f} MiB predicted {found / 2**20:8.0f} MiB measured"
    more = f"  {row['resident_bytes'] / 2**20:.0f} MiB resident" if "resident_bytes" in row else ""
    if row["method"] != "exact":
        times = f"{row['predicted_seconds']:.1f} s predicted {row['seconds']:.1f} s measured"
        loud = f", {row['loud']} loud" if row["method"] == "adjoint" else ""
        more += f"{loud}, {times}"
    return f"{row['name']:28s} {sizes}  {predicted / found - 1:+6.1%}{more}"


def measure(case: PlannedRun) -> dict:
    """Measure a row of the table in a process of its own, a sweep or a way back in two."""
    command = [sys.executable, "-m", "bench.memory.plan", "--case", json.dumps(asdict(case))]

    def once(**environment: str) -> dict:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE, text=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    freed = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    if case.method == "exact":
        return once(**(freed if case.stream or case in TODAY else {}))
    resident = once()
    times = {name: resident[name] for name in ("seconds", "predicted_seconds") if name in resident}
    return once(**freed) | {"resident_bytes": resident["measured_bytes"], **times}


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.memory.plan", __doc__)
    parser.add_argument("--out", type=writable)
    parser.add_argument("--quick", action="store_true", help="five small shapes, in seconds: checks that it runs")
    parser.add_argument("--only", metavar="NAME", help="only cases whose names begin with this")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        given = json.loads(options.case)
        print(json.dumps(run(PlannedRun(**{**given, "lengths": tuple(given["lengths"])}))))
        return
    if not measurable():
        raise SystemExit("bench.memory.plan: peaks of memory can be measured on Linux only.")
    rows = []
    for case in QUICK if options.quick else FULL + ADJOINT + LINEAR + TODAY:
        if options.only and not case.name.startswith(options.only):
            continue
        rows.append(measure(case))
        print(line(rows[-1]), flush=True)
    if not rows:
        raise SystemExit(f"bench.memory.plan: no case begins with {options.only!r}.")
    worst = max(abs(row["predicted_bytes"] / row["measured_bytes"] - 1) for row in rows)
    goal = f"goal: {GOAL:.0%}, {'reached' if worst <= GOAL else 'MISSED'}"
    print(f"furthest off: {worst:.1%}; {'too small to be held to the goal' if options.quick else goal}")
    if options.out is not None:
        write_results(options.out, "plan", [], goal=GOAL, predictions=rows)


if __name__ == "__main__":
    main()
