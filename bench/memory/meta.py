"""The memory of runs on a GPU, counted without one: ``python -m bench.memory.meta [--out FILE.json]``.

With ``--where`` the operations are also counted by the function of this library that asks for them.

The whole run is made on torch's meta device, whose tensors have shapes and no numbers, so that a model of 7B costs
nothing. Every storage that an operation makes is counted until it is let go, and the peak stands beside the planner's
prediction for a GPU. The count leaves out the GEMM library's own buffers and the allocator's rounding.

A few decisions of a run depend on numbers (has a weight zeros?). Here each of them takes the usual way.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

from depass_fast import DePass, Heads, Modules, Neurons, Tokens, engine, request
from depass_fast.adapters import Adapter
from depass_fast.adjoint import fused, stack, sweep
from depass_fast.adjoint.memory import SweepMemory, default_workspace
from depass_fast.backends import selection
from depass_fast.backends.torch import backend as torch_backend
from depass_fast.backends.torch import linear, mlp
from depass_fast.backends.triton import backend as triton_backend
from depass_fast.backends.triton import linear as triton_linear
from depass_fast.components import start as initial
from depass_fast.ledger import norms
from depass_fast.ledger.book import Ledger
from depass_fast.options import LINEAR, Adjoint, BackendName, LinearRuleName, RuleName
from depass_fast.planning import planner
from depass_fast.planning.plan import Plan
from depass_fast.planning.shapes import RunShape
from depass_fast.propagation.joint import JOINT_BYTES
from depass_fast.results.completeness import CompletenessWarning
from depass_fast.results.estimate import ApproximationWarning
from depass_fast.trace import attention, capture, own_pass

from ..core.cli import command, writable
from ..core.models import SHAPES, build_model
from ..core.results import write_results

GOAL = 0.15
FREE = 130 << 30  # bytes that a GPU has to spare
META = torch.device("meta")
_LAUNCH_NOTHING = {"empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view"}
_KINDS = {
    "tokens": Tokens(),
    "neurons": Neurons(0),
    "heads": Heads(0),
    "heads of all layers": Heads(layers="all"),
    "all neurons": Neurons(layers="all"),
    "modules": Modules(0),
}


@dataclass(frozen=True)
class CountedRun:
    """A decomposition of prompts of ``lengths`` tokens through the first ``layers`` of a model's shape."""

    model: str
    components: str
    lengths: tuple[int, ...]
    backend: BackendName
    layers: int = 4
    call: str = "attribute"
    dtype: str = "bfloat16"
    state_dtype: str = "float32"
    memory_budget: int | None = None
    refine: int = 0  # of all neurons, by the adjoint sweep
    rule: RuleName = "softmax"

    @property
    def method(self) -> dict[str, Any]:
        """The keywords of ``attribute``."""
        return {"method": Adjoint(refine=self.refine, sample=0)} if self.components == "all neurons" else {}

    @property
    def name(self) -> str:
        prompts = f"N={self.lengths[0]}" if len(self.lengths) == 1 else f"{len(self.lengths)} prompts"
        more = [] if self.dtype == "bfloat16" else [self.dtype]
        more += [] if self.state_dtype == "float32" else [f"state {self.state_dtype}"]
        more += [f"adjoint, refine {self.refine:,}"] if self.method else []
        more += [] if self.rule == "softmax" else [self.rule]
        more += [] if self.memory_budget is None else [f"{self.memory_budget >> 20} MiB of workspace"]
        return ", ".join([self.components, prompts, self.call, *more])


def cases() -> Iterator[CountedRun]:
    """The workloads of ``bench.speed.gpu``, and other families, dtypes and sizes of the workspace."""
    yield from ledgers()
    for backend in ("torch", "triton"):
        for model in ("llama-2-7b", "llama-3.1-8b", "qwen2-7b"):
            yield CountedRun(model, "neurons", (20,), backend)
            for length in (128, 512, 2048):
                yield CountedRun(model, "tokens", (length,), backend)
            yield CountedRun(model, "tokens", (20,) * 64, backend)
            yield CountedRun(model, "heads", (512,), backend)
            yield CountedRun(model, "heads of all layers", (20,), backend, layers=32)
            if backend == "torch":  # a sweep knows no backends
                yield CountedRun(model, "all neurons", (20,), backend, layers=32, refine=1000)
        yield CountedRun("llama-2-7b", "heads of all layers", (100,) * 4, backend, layers=16)
        yield CountedRun("llama-2-7b", "neurons", (3,) * 6, backend)
        yield CountedRun("llama-2-7b", "neurons", (1,), backend)
        yield CountedRun("llama-2-7b", "tokens", (512,), backend, call="decompose")
        for length in (64, 200):
            yield CountedRun("pythia-6.9b", "heads of all layers", (length,), backend, layers=12)
        yield CountedRun("pythia-6.9b", "heads of all layers", (60,) * 4, backend, layers=12)
        for model in ("pythia-6.9b", "gemma-2-9b"):
            yield CountedRun(model, "neurons", (20,), backend)
            yield CountedRun(model, "tokens", (512,), backend)
        yield CountedRun("llama-2-7b", "tokens", (512,), backend, dtype="float32")
        yield CountedRun("llama-2-7b", "neurons", (20,), backend, dtype="float32")
        yield CountedRun("llama-2-7b", "tokens", (512,), backend, state_dtype="bfloat16")
        for rule in ("half", "shapley"):
            yield CountedRun("llama-2-7b", "tokens", (512,), backend, rule=rule)
        for components, lengths in (("neurons", (20,)), ("modules", (512,) * 4)):
            yield CountedRun("llama-2-7b", components, lengths, backend, rule="shapley")
        yield CountedRun("llama-2-7b", "heads of all layers", (20,), backend, layers=32, rule="shapley")
        yield CountedRun("pythia-6.9b", "tokens", (512,), backend, rule="shapley")
        yield CountedRun("gemma-2-9b", "neurons", (20,), backend, rule="half")
        for budget in (128 << 20, 4 << 30):
            yield CountedRun("llama-2-7b", "tokens", (512,), backend, memory_budget=budget)
            yield CountedRun("llama-2-7b", "neurons", (20,), backend, memory_budget=budget)


def ledgers() -> Iterator[CountedRun]:
    """Ledgers of many short prompts and of a long one; a way back knows no backends."""
    for lengths in ((20,) * 64, (2048,)):
        yield CountedRun("llama-2-7b", "tokens", lengths, "torch", layers=32, call="ledger", rule="shapley")


class Counted(TorchDispatchMode):
    """Counts the operations that a GPU would be given, and the bytes that it would hold beside ``model``.

    ``operations`` are launches of kernels and copies; ``places`` has them by the function that asks for them, "model"
    where the model's own code does, or our pass in its place. ``now`` and ``peak`` are bytes of storages.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.places: Counter[str] = Counter()
        self._model = [x.untyped_storage() for x in (*model.parameters(), *model.buffers())]
        self._alive: dict[int, object] = {id(storage): storage for storage in self._model}  # by the objects' identities

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, answer = kwargs or {}, _answer(func, args, kwargs or {})
        made = func(*args, **kwargs) if answer is None else answer
        on_device = [x for x in tree_leaves(made) if isinstance(x, Tensor) and x.device == META]
        for x in on_device:
            self._count(x.untyped_storage())
        launched = on_device and not func.is_view and func.overloadpacket.__name__ not in _LAUNCH_NOTHING
        if launched or answer is not None:
            self.launch()
        return made

    def launch(self) -> None:
        """Count an operation of the function that is running."""
        self.places[_place()] += 1

    @property
    def operations(self) -> int:
        return self.places.total()

    @property
    def own(self) -> int:
        """The operations without those of the model's own code."""
        return self.operations - self.places["model"]

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def gone(_: weakref.ref) -> None:
            self._alive.pop(key)
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _place() -> str:
    """The innermost function of this library that is running, as `room/file.py function`; or the model's own code.

    A pass of ours in its place counts as that, with the norms that it asks the adapter for.
    """
    frame, innermost = sys._getframe(1), ""
    while frame is not None:
        _, found, place = frame.f_code.co_filename.rpartition("/depass_fast/")
        if "/transformers/models/" in frame.f_code.co_filename or place == "trace/own_pass.py":
            return "model"
        if found:
            innermost = innermost or f"{place} {frame.f_code.co_name}"
            if not place.startswith("adapters/"):
                return innermost
        frame = frame.f_back
    return innermost or "elsewhere"


def _answer(func: Any, args: tuple, kwargs: dict) -> Any:
    """Ones in the place of numbers that an operation asks for; None for any other operation."""
    aten = torch.ops.aten
    if func is aten._local_scalar_dense.default and args[0].device == META:
        return 1
    if func is aten._to_copy.default and args[0].device == META and kwargs.get("device") == torch.device("cpu"):
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    return None


@contextmanager
def standing_in() -> Iterator[None]:
    """Let the meta device stand in for a GPU: every check that looks at numbers is left out."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **more: object) -> tuple[Tensor, None]:
        return torch.empty_like(q), None  # fused on a GPU

    def rms_norm(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x.clone()  # one operation on a GPU

    find_responses = stack.LayerStack.responses

    def respond(layers: stack.LayerStack, indices: Sequence[int]) -> list[float]:
        return [1.0 for _ in find_responses(layers, indices)]  # no component is quiet

    with ExitStack() as undo:
        for place, name, instead in (
            (stack.LayerStack, "responses", respond),
            (engine, "check_weights", lambda adapter: None),
            (Adapter, "check_linear_rule", lambda adapter, rule: None),
            (capture, "check_finite", lambda adapter, trace: None),
            (capture.consistency.Checked, "knows", lambda *about: True),
            (
                own_pass,
                "admitted",
                lambda adapter, _: own_pass.OwnPass.of(adapter) if own_pass.can_run(adapter) else None,
            ),
            (attention, "causal_attention", attend),
            (nn.functional, "rms_norm", rms_norm),
            (initial, "settle_rounding", lambda *parts: False),
            (mlp, "has_zeros", lambda x: False),
            (selection, "why_not_triton", lambda device, dtype: None),
            (norms, "why_not_triton", lambda device, dtype: None),
            (request, "check_activations", lambda adapter, trace: None),
            (stack, "maps_class", lambda device, dtype: fused.FusedMaps),
            (planner, "available", lambda device: FREE),
            (sweep, "available", lambda device: FREE),
            (sweep, "default_workspace", lambda free, cuda: default_workspace(free, True)),
            (
                sweep,
                "SweepMemory",
                lambda n, width, widest, item, starts, cuda: SweepMemory(n, width, widest, item, starts, cuda=True),
            ),
        ):
            undo.enter_context(mock.patch.object(place, name, instead))
        yield


@contextmanager
def counting(model: nn.Module) -> Iterator[Counted]:
    """Count within :func:`standing_in`; Triton's kernels are counted instead of launched."""
    counted = Counted(model)

    def launch(*args: object, **kwargs: object) -> None:
        counted.launch()

    with ExitStack() as undo:
        # a GPU's product adds up in a wider dtype by itself
        for place in (fused, mlp, linear, torch_backend, triton_backend, triton_linear):
            undo.enter_context(mock.patch.object(place, "accumulate", launch))
        undo.enter_context(mock.patch.object(KernelInterface, "__getitem__", lambda kernel, grid: launch))
        undo.enter_context(counted)
        yield counted


def count(case: CountedRun, again: bool = False) -> tuple[Plan, Counted]:
    """Return the plan for a GPU, and what was counted; ``again``: of a second call of the same model."""
    shape, prompts = SHAPES[case.model], [torch.arange(n) for n in case.lengths]
    shape, kind = replace(shape, layers=min(case.layers, shape.layers)), _KINDS[case.components]
    with standing_in(), warnings.catch_warnings():
        for category in (ApproximationWarning, CompletenessWarning):  # of scores that are no numbers
            warnings.simplefilter("ignore", category)
        model = build_model(shape, getattr(torch, case.dtype), device=META)
        options: dict[str, Any] = {
            "state_dtype": case.state_dtype,
            "memory_budget": case.memory_budget,
            "allocation": case.rule,
        }
        dp = DePass(model, backend=case.backend, **options)
        method, loud = (Adjoint(case.refine, "all", 0), 1) if case.method else (None, None)
        whole: dict[str, Any] = {"method": LINEAR, "is_ledger": True}
        ways: dict[str, Any] = whole if case.call == "ledger" else {"method": method}
        run_shape = RunShape(dp.adapter, case.lengths, kind, dp.options, **ways)
        plan = planner.make_plan(run_shape, device=torch.device("cuda"), loud=loud)
        how: dict[str, Any] = case.method or {"method": "exact"}
        for _ in range(1 + again):
            with counting(dp.model) as counted:
                if case.call == "decompose":
                    dp.decompose(prompts, kind)
                elif case.call == "ledger":
                    ask_for_everything(dp.ledger(prompts, 7, rule=cast(LinearRuleName, case.rule)))
                else:
                    dp.attribute(prompts, kind, 7, **how)
    return plan, counted


def ask_for_everything(ledger: Ledger) -> None:
    """Ask for the neurons and heads of all layers, and the tokens."""
    for answers in (ledger.neurons, ledger.heads, ledger.tokens):
        answers()


def run(case: CountedRun) -> dict:
    """Return the prediction for a GPU beside the counted peak."""
    return row_of(case, *count(case))


def row_of(case: CountedRun, plan: Plan, counted: Counted) -> dict:
    """Return the row of the results for a run that was counted."""
    state = plan.state_bytes if plan.start_layers == 1 or case.method else min(plan.state_bytes, JOINT_BYTES)
    return asdict(case) | {
        "name": case.name,
        "predicted_bytes": (plan.estimates[0] if case.call == "ledger" else plan.of(case.backend)).peak_bytes,
        "measured_bytes": counted.peak,
        "state_bytes": state,
        "trace_bytes": plan.trace_bytes,
        "operations": counted.operations,
    }


def line(case: CountedRun, row: dict) -> str:
    predicted, found = row["predicted_bytes"], row["measured_bytes"]
    beside = found - row["state_bytes"] - row["trace_bytes"]
    return (
        f"{case.backend:6} {case.model:12} {case.name:52} {predicted / 2**30:6.2f} GiB predicted "
        f"{found / 2**30:6.2f} GiB allocated {predicted / found - 1:+7.1%}  {beside / 2**30:5.2f} GiB beside the state "
        f"{row['operations']:6,} operations"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.memory.meta", __doc__)
    parser.add_argument("--out", type=writable)
    parser.add_argument("--only", metavar="TEXT", help="cases whose line holds this")
    parser.add_argument("--where", action="store_true", help="print which functions ask for the operations")
    options = parser.parse_args(arguments)
    rows = []
    for case in cases():
        if options.only and options.only not in f"{case.backend} {case.model} {case.name}":
            continue
        plan, counted = count(case)
        rows.append(row_of(case, plan, counted))
        print(line(case, rows[-1]), flush=True)
        for place, operations in counted.places.most_common() if options.where else ():
            print(f"       {operations:6,} {place}")
    if not rows:
        raise SystemExit(f"bench.memory.meta: no case holds {options.only!r}.")
    worst = max(abs(row["predicted_bytes"] / row["measured_bytes"] - 1) for row in rows)
    print(f"furthest off: {worst:.1%}; goal: {GOAL:.0%}, {'reached' if worst <= GOAL else 'MISSED'}")
    if options.out is not None:
        write_results(options.out, "meta", [], goal=GOAL, predictions=rows)


if __name__ == "__main__":
    main()
