"""Plans of decompositions before they are run: FLOP, memory and time, from shapes alone (DESIGN.md section 5).

A plan needs no weights: the shapes come from a loaded model, or from one that is made of a config on torch's meta
device. Every run makes one before it does any work, takes its workspace from it, and raises if it cannot fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..adapters import Adapter
from ..backends import backend_status
from ..backends.torch.division import default_budget
from ..backends.workload import Workload
from ..components.base import ComponentKind
from ..components.model import Tokens
from ..options import Adjoint, Options
from ..propagation.joint import JOINT_BYTES
from ..runtime.dtypes import dtype_name, widest
from ..runtime.memory import available
from ..trace.record import Trace
from ..trace.size import without_weights
from .adjoint import SweepOutlook, sweep_outlook
from .exact import JOINTLY, SINGLY, estimates
from .plan import BackendEstimate, Plan
from .shapes import ForwardPass, has_bias, layer_sizes, named_components, reach

if TYPE_CHECKING:
    pass

# shares of the GEMM rate, measured on a CPU by bench.speed.cpu and bench.memory.plan, on a GPU by bench.speed.gpu
EFFICIENCY = {"torch": 0.75, "reference": 0.25, "adjoint": 0.5}
ON_A_GPU = {"torch": 0.3, "triton": 0.7, "adjoint": 0.2}


def plan(
    adapter: Adapter,
    lengths: Sequence[int],
    kind: ComponentKind,
    options: Options | None = None,
    *,
    end: int | None = None,
    device: torch.device | None = None,
    traced: bool = False,
    counts: Sequence[int] | None = None,
    method: Adjoint | None = None,
    loud: int | None = None,
    gemm_flops: float | None = None,
    rate_source: str = "given",
) -> Plan:
    """Return the plan of a decomposition of prompts of ``lengths`` tokens, carried to the input of layer ``end``.

    Args:
        adapter: of a model, with weights or without (:func:`for_config`).
        end: None: after the final norm.
        device: the device that it will run on. Default: the model's; of several, the one with least to spare.
        traced: the trace exists already, and is no part of the peak.
        counts: named components of every prompt, where that is known (:func:`known_counts`), or bounds of them.
        method: None: exact.
        loud: the number of loud components of every start layer of an adjoint sweep, where that is known.
        gemm_flops: FLOP per second of a large GEMM in the compute dtype; ``rate_source`` says where it comes from.

    Raises:
        ValueError, TypeError: this model does not have such components or options.
    """
    options, spread = options or Options(), device is None
    device = device or adapter.device
    kind.check(adapter, lengths)
    if method is not None:
        outlook = sweep_outlook(
            adapter, lengths, kind, options, method, end=end, device=device, traced=traced, counts=counts
        )
        return _adjoint(adapter, lengths, kind, outlook, device, loud, gemm_flops, rate_source)
    made = _exact(adapter, lengths, kind, options, end, device, traced, counts, gemm_flops, rate_source)
    return _tightest(adapter, made, end, traced) if spread else made


def _exact(
    adapter: Adapter,
    lengths: Sequence[int],
    kind: ComponentKind,
    options: Options,
    end: int | None,
    device: torch.device,
    traced: bool,
    counts: Sequence[int] | None,
    gemm_flops: float | None,
    rate_source: str,
) -> Plan:
    """The plan of a state, or of those of several layers in one sweep: an upper bound where not all fit together."""
    kinds = list(kind.each(adapter))
    found = [_workload(adapter, lengths, one, options, end, device, counts) for one in kinds]
    workloads, known = [work for work, _ in found], all(is_known for _, is_known in found)
    state, compute = options.dtypes(adapter.dtype, device)
    forward = ForwardPass.of(adapter, lengths, traced)
    rates = _rates(device, widest(state, compute, adapter.dtype), gemm_flops)
    return Plan(
        method="exact",
        components=kind.kind,
        layer=kinds[0].resolve(adapter),
        start_layers=len(workloads),
        layers_passed=sum(len(work.passed) for work in workloads),
        lengths=tuple(lengths),
        n_components=max(max(work.counts) for work in workloads),
        rows=sum(work.rows for work in workloads),
        hidden_size=adapter.hidden_size,
        device=str(device),
        dtype=dtype_name(adapter.dtype),
        state_dtype=dtype_name(state),
        compute_dtype=dtype_name(compute),
        flop=sum(work.flop for work in workloads),
        weights_bytes=_weights(adapter),
        trace_bytes=forward.trace,
        state_bytes=sum(work.state_bytes for work in workloads),
        estimates=estimates(_groups(workloads), forward, rates),
        available_bytes=available(device),
        gemm_flops=gemm_flops,
        rate_source="" if gemm_flops is None else rate_source,
        upper_bound=kind.is_layered or not known,
    )


def _tightest(adapter: Adapter, made: Plan, end: int | None, traced: bool) -> Plan:
    """The plan of the device with least to spare, of the several that a model lies on.

    Every one holds the trace of its own layers; state and workspace go from one to the next.
    """
    n_layers, plans = adapter.n_layers, []
    places = [adapter.layer_device(index) for index in range(n_layers)]
    if len(set(places)) == 1:
        return made
    for device in dict.fromkeys(places[made.layer : end] or places[-1:]):
        elsewhere = 0 if traced else made.trace_bytes * (n_layers - places.count(device)) // n_layers
        needs = tuple(
            replace(e, peak_bytes=e.peak_bytes - elsewhere, forward_bytes=e.forward_bytes - elsewhere)
            for e in made.estimates
        )
        plans.append(replace(made, device=str(device), available_bytes=available(device), estimates=needs))
    known = [one for one in plans if one.available_bytes is not None]
    return min(known, key=lambda one: one.available_bytes - one.estimates[0].peak_bytes, default=made)


def _groups(workloads: Sequence[Workload]) -> list[list[Workload]]:
    """Neighbours that are carried together where memory allows, as :func:`.joint.group_by_memory` does."""
    groups: list[list[Workload]] = [[]]
    for work in workloads:
        if groups[-1] and sum(other.state_bytes for other in groups[-1]) + work.state_bytes > JOINT_BYTES:
            groups.append([])
        groups[-1].append(work)
    return groups


def _workload(
    adapter: Adapter,
    lengths: Sequence[int],
    kind: ComponentKind,
    options: Options,
    end: int | None,
    device: torch.device,
    counts: Sequence[int] | None,
) -> tuple[Workload, bool]:
    """The state of a kind at one layer and its way; True if that is known before the prompts are traced."""
    state, compute = options.dtypes(adapter.dtype, device)
    entering, last = reach(kind, adapter, end)
    extras = int(not isinstance(kind, Tokens)) + has_bias(kind, adapter, end)
    named, exact = zip(*(named_components(kind, adapter, n) for n in lengths), strict=True)
    if counts is not None:
        named, exact = counts, (True,)
    staggered, counts = isinstance(kind, Tokens), [n + extras for n in named]
    rows = [n * (n + 1) // 2 + n * extras if staggered else n * m for n, m in zip(lengths, counts, strict=True)]
    first_end = kind.entry(adapter).first_end
    passed = [replace(size, skip_attention=entering <= i < first_end) for i, size in enumerate(layer_sizes(adapter))]
    work = Workload(
        lengths=tuple(lengths),
        counts=tuple(counts),
        rows_of=tuple(rows),
        staggered=staggered,
        width=adapter.hidden_size,
        state_item=state.itemsize,
        item=compute.itemsize,
        casts=compute != adapter.dtype,
        budget=options.memory_budget or default_budget(device),
        on_cpu=device.type == "cpu",
        passed=tuple(passed[entering:last]),
    )
    return work, all(exact)


def _adjoint(
    adapter: Adapter,
    lengths: Sequence[int],
    kind: ComponentKind,
    outlook: SweepOutlook,
    device: torch.device,
    loud: int | None,
    gemm_flops: float | None,
    rate_source: str,
) -> Plan:
    """The plan of an adjoint sweep: with no loud components and with as many as are ever carried, or with ``loud``."""
    free = available(device)
    workspace = outlook.default_workspace(free)
    rate = _rate("adjoint", device, gemm_flops)
    cases = [("adjoint", 0), ("adjoint, many loud", None)] if loud is None else [("adjoint", loud)]
    found = []
    for name, number in cases:
        flop, peak = outlook.flop(workspace, number), outlook.peak(workspace, number)
        found.append(
            BackendEstimate(
                backend=name,
                flop=flop,
                workspace_bytes=peak - outlook.peak(outlook.smallest(workspace), number),
                peak_bytes=peak,
                forward_bytes=outlook.forward.peak,
                host_bytes=0,
                seconds=None if rate is None else (flop + outlook.forward.flop) / rate,
            )
        )
    rows = outlook.rows(cases[-1][1])
    return Plan(
        method="adjoint",
        components=kind.kind,
        layer=outlook.layer,
        start_layers=len(list(kind.each(adapter))),
        layers_passed=outlook.layers_passed,
        lengths=tuple(lengths),
        n_components=outlook.n_components,
        rows=rows,
        hidden_size=adapter.hidden_size,
        device=str(device),
        dtype=dtype_name(adapter.dtype),
        state_dtype=dtype_name(outlook.wide),
        compute_dtype=dtype_name(outlook.compute),
        flop=found[0].flop,
        weights_bytes=_weights(adapter),
        trace_bytes=outlook.forward.trace,
        state_bytes=rows * adapter.hidden_size * outlook.wide.itemsize,
        estimates=tuple(found),
        available_bytes=free,
        gemm_flops=gemm_flops,
        rate_source="" if gemm_flops is None else rate_source,
        upper_bound=outlook.upper_bound,
    )


def _rates(device: torch.device, dtype: torch.dtype, gemm_flops: float | None) -> dict[str, float | None]:
    """FLOP per second of every backend that can run on a device in ``dtype``; all can on another machine's device."""
    elsewhere = device.type == "cuda" and not torch.cuda.is_available()
    status = {} if elsewhere else backend_status(device, dtype)
    usable = [name for name in (*JOINTLY, *SINGLY) if status.get(name) is None]
    return {name: _rate(name.partition(",")[0], device, gemm_flops) for name in usable}


def _rate(name: str, device: torch.device, gemm_flops: float | None) -> float | None:
    """FLOP per second that a backend reaches; None where that is not known."""
    share = (EFFICIENCY if device.type == "cpu" else EFFICIENCY | ON_A_GPU).get(name)
    return None if gemm_flops is None or share is None else gemm_flops * share  # none: interpreted, for tests


def _weights(adapter: Adapter) -> int:
    return sum(p.numel() * p.element_size() for p in adapter.model.parameters())


def for_config(config: Any, dtype: torch.dtype | None = None) -> Adapter:
    """An adapter to plan with, from transformers' config alone; ``dtype`` of the weights, by default the stored one.

    Raises:
        ValueError: the family is not supported.
    """
    adapter = without_weights(config)
    stored = config.dtype if hasattr(config, "dtype") else getattr(config, "torch_dtype", None)  # its older name
    adapter.model.to(dtype or stored or torch.float32)
    return adapter


def known_counts(kind: ComponentKind, adapter: Adapter, trace: Trace) -> list[int] | None:
    """Return the number of named components of every prompt of a trace; None if it is known without a trace."""
    if kind.is_layered or named_components(kind, adapter, 1)[1]:
        return None
    return [len(kind.bound(adapter, trace, p).names(adapter, [""] * trace.length(p))) for p in range(trace.n_prompts)]


def check_length(length: int, adapter: Adapter) -> int:
    """A number of tokens that the model can read. ValueError where it cannot."""
    limit = adapter.context_length
    if isinstance(length, bool) or length < 1 or (limit is not None and length > limit):
        raise ValueError(f"length: {length} is out of range; this model reads 1 to {limit or 'any number of'} tokens.")
    return length
