"""Plans of decompositions before they are run: FLOP, memory and time, from shapes alone (DESIGN.md section 5).

A plan needs no weights: the shapes come from a loaded model, or from one that is made of a config on torch's meta
device. Every run makes one before it does any work, takes its workspace from it, and raises if it cannot fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..adapters import Adapter
from ..allocation import Allocation
from ..backends import backend_status
from ..backends.shard import shard_name
from ..backends.torch.division import default_budget
from ..backends.workload import Workload
from ..components.base import ComponentKind
from ..components.features import Features
from ..components.model import Neurons, Tokens
from ..linear_rules import looks_at_up
from ..propagation.joint import JOINT_BYTES
from ..runtime.dtypes import dtype_name, widest
from ..runtime.memory import available
from ..trace.record import Trace
from ..trace.size import without_weights
from .adjoint import sweep_outlook
from .exact import JOINTLY, SINGLY, estimates
from .ledger import ledger_outlook
from .plan import BackendEstimate, Plan
from .recurrences import mixer_sizes
from .shapes import ForwardPass, RunShape, has_bias, layer_sizes, named_components, reach

# shares of the GEMM rate, measured on a CPU by bench.speed.cpu and bench.memory.plan, on a GPU by bench.speed.gpu
EFFICIENCY = {"torch": 0.75, "reference": 0.25, "adjoint": 0.5, "ledger": 0.5}
ON_A_GPU = {"torch": 0.3, "triton": 0.7, "adjoint": 0.2, "ledger": 0.2}


@dataclass(frozen=True)
class _GemmRate:
    """FLOP per second of a large GEMM in the compute dtype, None if unknown, and where the number comes from."""

    flops: float | None
    given_source: str

    @property
    def source(self) -> str:
        return "" if self.flops is None else self.given_source


def make_plan(
    shape: RunShape,
    *,
    device: torch.device | None = None,
    loud: int | None = None,
    gemm_flops: float | None = None,
    rate_source: str = "given",
) -> Plan:
    """Return the plan of a run.

    Args:
        shape: of a run of a model with weights or without (:func:`for_config`); counts as of :func:`known_counts`.
        device: the device that it will run on. Default: the model's; of several, the one with least to spare.
        loud: the number of loud components of every start layer of an adjoint sweep, where that is known.
        gemm_flops: FLOP per second of a large GEMM in the compute dtype; ``rate_source`` says where it comes from.

    Raises:
        ValueError, TypeError: this model does not have such components or options.
    """
    adapter, gemm = shape.adapter, _GemmRate(gemm_flops, rate_source)
    shape.kind.check(adapter, shape.lengths)
    if shape.is_linear:
        return _ledger(shape, device or adapter.device, gemm)
    if shape.method is not None:
        return _adjoint(shape, device or adapter.device, loud, gemm)
    plan = _exact(shape, device or adapter.device, gemm)
    return _tightest(shape, plan) if device is None else plan


def _exact(shape: RunShape, device: torch.device, gemm: _GemmRate) -> Plan:
    """The plan of a state, or of those of several layers in one sweep: an upper bound where not all fit together."""
    adapter, kind, lengths = shape.adapter, shape.kind, shape.lengths
    kinds = list(kind.each(adapter))
    found = [_workload(replace(shape, kind=one), device) for one in kinds]
    workloads, known = [work for work, _ in found], all(is_known for _, is_known in found)
    whole = [_workload(replace(shape, kind=one, ranks=None), device)[0] for one in kinds]
    state, compute = shape.options.dtypes(adapter.dtype, device)
    forward = ForwardPass.of(adapter, lengths, shape.traced, device)
    rates = _rates(device, widest(state, compute, adapter.dtype), gemm.flops, shape.ranks)
    return Plan(
        method="exact",
        components=kind.kind,
        layer=kinds[0].resolve(adapter),
        start_layers=len(workloads),
        layers_passed=sum(len(work.passed) for work in workloads),
        lengths=tuple(lengths),
        n_components=max(max(work.counts) for work in whole),
        rows=sum(work.rows for work in workloads),
        hidden_size=adapter.stream_width,
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
        gemm_flops=gemm.flops,
        rate_source=gemm.source,
        upper_bound=kind.is_layered or not known,
        ranks=shape.ranks,
        seconds_at_least=_has_recurrences(adapter),
    )


def _tightest(shape: RunShape, plan: Plan) -> Plan:
    """The plan of the device with least to spare, of the several that a model lies on.

    Every one holds the trace of its own layers; state and workspace go from one to the next.
    """
    adapter, n_layers, plans = shape.adapter, shape.adapter.n_layers, []
    places = [adapter.layer_device(index) for index in range(n_layers)]
    if len(set(places)) == 1:
        return plan
    for device in dict.fromkeys(places[plan.layer : shape.end] or places[-1:]):
        elsewhere = 0 if shape.traced else plan.trace_bytes * (n_layers - places.count(device)) // n_layers
        needs = tuple(
            replace(e, peak_bytes=e.peak_bytes - elsewhere, forward_bytes=e.forward_bytes - elsewhere)
            for e in plan.estimates
        )
        plans.append(replace(plan, device=str(device), available_bytes=available(device), estimates=needs))
    known = [one for one in plans if one.available_bytes is not None]
    return min(known, key=lambda one: one.available_bytes - one.estimates[0].peak_bytes, default=plan)


def _groups(workloads: Sequence[Workload]) -> list[list[Workload]]:
    """Return groups of neighbours that are carried together where memory allows.

    Unlike :func:`depass_fast.propagation.joint.group_by_memory` it ignores free memory: no plan depends on that.
    """
    groups: list[list[Workload]] = [[]]
    for work in workloads:
        if groups[-1] and sum(other.state_bytes for other in groups[-1]) + work.state_bytes > JOINT_BYTES:
            groups.append([])
        groups[-1].append(work)
    return groups


def _workload(shape: RunShape, device: torch.device) -> tuple[Workload, bool]:
    """The state of a kind at one layer and its way; True if that is known before the prompts are traced.

    Of several ranks it is the first one's, which has the extras.
    """
    adapter, lengths, kind, options = shape.adapter, shape.carried_lengths, shape.kind, shape.options
    end, counts = shape.end, shape.counts
    state, compute = options.dtypes(adapter.dtype, device)
    entering, last = reach(kind, adapter, end)
    allocation = Allocation(options.allocation)
    extras = int(not isinstance(kind, Tokens)) + has_bias(kind, adapter, end, allocation)
    named, exact = zip(*(named_components(kind, adapter, n) for n in lengths), strict=True)
    if counts is not None:
        named, exact = counts, (True,)
    staggered, ranks = isinstance(kind, Tokens), shape.ranks or 1
    counts = [-(-n // ranks) + extras for n in named]
    rows = [sum(range(n, 0, -ranks)) + n * extras if staggered else n * m for n, m in zip(lengths, counts, strict=True)]
    every = 0 if ranks == 1 or isinstance(kind, Tokens | Neurons | Features) else sum(named) * max(lengths)
    first_end, sizes = kind.entry(adapter).first_end, layer_sizes(adapter)
    taken = {size.source for size in sizes[entering:last] if size.source is not None and size.source >= first_end}
    reads_up = looks_at_up(allocation.linear_rule)
    shares = options.value_activation == "shared" and allocation.linear_rule is None
    passed = [
        replace(
            size,
            skip_attention=entering <= i < first_end or not (size.source is None or size.source in taken),
            reads_up=size.has_up and reads_up,
            shared_values=size.v if shares and adapter.activates_values(i) else 0,
        )
        for i, size in enumerate(sizes)
    ]
    by_default = options.takes_float16(adapter.dtype, device)
    work = Workload(
        lengths=tuple(lengths),
        counts=tuple(counts),
        row_counts=tuple(rows),
        staggered=staggered,
        width=adapter.hidden_size,
        streams=adapter.stream_width // adapter.hidden_size,
        between=adapter.width_at("resid_mid") // adapter.hidden_size,
        state_item=state.itemsize,
        item=compute.itemsize,
        casts=compute != adapter.dtype,
        float16=device.type != "cpu" and (by_default or compute == torch.float16),
        float16_by_default=by_default,
        budget=options.memory_budget or default_budget(device),
        on_cpu=device.type == "cpu",
        passed=tuple(passed[entering:last]),
        linear_rule=allocation.linear_rule,
        made=every * adapter.stream_width * state.itemsize,
        kept=len(taken) + any(size.ahead for size in sizes[first_end:last]),
    )
    return work, all(exact)


def _adjoint(shape: RunShape, device: torch.device, loud: int | None, gemm: _GemmRate) -> Plan:
    """The plan of an adjoint sweep: with no loud components and with as many as are ever carried, or with ``loud``."""
    adapter, kind, outlook = shape.adapter, shape.kind, sweep_outlook(shape, device)
    free = available(device)
    workspace = outlook.default_workspace(free)
    reached = _rate("adjoint", device, gemm.flops)
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
                seconds=None if reached is None else (flop + outlook.forward.flop) / reached,
            )
        )
    rows = outlook.rows(cases[-1][1])
    return Plan(
        method="adjoint",
        components=kind.kind,
        layer=outlook.layer,
        start_layers=len(list(kind.each(adapter))),
        layers_passed=outlook.layers_passed,
        lengths=tuple(shape.lengths),
        n_components=outlook.n_components,
        rows=rows,
        hidden_size=adapter.stream_width,
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
        gemm_flops=gemm.flops,
        rate_source=gemm.source,
        upper_bound=outlook.upper_bound,
        seconds_at_least=_has_recurrences(adapter),
    )


def _ledger(shape: RunShape, device: torch.device, gemm: _GemmRate) -> Plan:
    """The plan of a way back under a linear rule."""
    adapter, outlook = shape.adapter, ledger_outlook(shape, device)
    work, workspace, reached = outlook.work, outlook.default_workspace, _rate("ledger", device, gemm.flops)
    flop, peak = work.flop(), outlook.peak(workspace)
    estimate = BackendEstimate(
        backend="adjoint",
        flop=flop,
        workspace_bytes=peak - outlook.least(),
        peak_bytes=peak,
        forward_bytes=outlook.forward.peak,
        host_bytes=0,
        seconds=None if reached is None else (flop + outlook.forward.flop) / reached,
    )
    return Plan(
        method="adjoint",
        components="ledger" if shape.is_ledger else shape.kind.kind,
        layer=outlook.layer,
        start_layers=adapter.n_layers if shape.is_ledger else len(list(shape.kind.each(adapter))),
        layers_passed=len(work.passed),
        lengths=tuple(shape.lengths),
        n_components=outlook.n_components,
        rows=work.rows * work.positions,
        hidden_size=adapter.stream_width,
        device=str(device),
        dtype=dtype_name(adapter.dtype),
        state_dtype=dtype_name(outlook.state),
        compute_dtype=dtype_name(outlook.compute),
        flop=flop,
        weights_bytes=_weights(adapter),
        trace_bytes=outlook.forward.trace,
        state_bytes=work.kept,
        estimates=(estimate,),
        available_bytes=available(device),
        gemm_flops=gemm.flops,
        rate_source=gemm.source,
        upper_bound=outlook.upper_bound,
        seconds_at_least=_has_recurrences(adapter),
    )


def _rates(
    device: torch.device, dtype: torch.dtype, gemm_flops: float | None, ranks: int | None
) -> dict[str, float | None]:
    """FLOP per second of every backend that can run on a device in ``dtype``; all can on another machine's device.

    Where components are dealt to ``ranks``, that is the backend of a part.
    """
    if ranks is not None:
        return {name: _rate("torch", device, gemm_flops) for name in (shard_name(ranks), shard_name(ranks, True))}
    elsewhere = device.type == "cuda" and not torch.cuda.is_available()
    status = {} if elsewhere else backend_status(device, dtype)
    usable = [name for name in (*JOINTLY, *SINGLY) if status.get(name) is None]
    return {name: _rate(name.partition(",")[0], device, gemm_flops) for name in usable}


def _rate(name: str, device: torch.device, gemm_flops: float | None) -> float | None:
    """FLOP per second that a backend reaches; None where that is not known."""
    share = (EFFICIENCY if device.type == "cpu" else EFFICIENCY | ON_A_GPU).get(name)
    return None if gemm_flops is None or share is None else gemm_flops * share  # none: interpreted, for tests


def _has_recurrences(adapter: Adapter) -> bool:
    return any(mixer is not None and mixer.heads for mixer in mixer_sizes(adapter))


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
    """Return the number of named components of every prompt of a trace; None if it is known without a trace.

    Of several layers it is the largest.
    """
    kinds = kind.each(adapter)
    if all(named_components(one, adapter, 1)[1] for one in kinds):
        return None
    counts = [_counts(one, adapter, trace) for one in kinds]
    return [max(of_prompt) for of_prompt in zip(*counts, strict=True)]


def _counts(kind: ComponentKind, adapter: Adapter, trace: Trace) -> list[int]:
    if isinstance(kind, Neurons):
        return kind.counts(adapter, trace)
    return [len(kind.bound(adapter, trace, p).names(adapter, [""] * trace.length(p))) for p in range(trace.n_prompts)]


def check_length(length: int, adapter: Adapter) -> int:
    """A number of tokens that the model can read. ValueError where it cannot."""
    limit = adapter.context_length
    if isinstance(length, bool) or length < 1 or (limit is not None and length > limit):
        raise ValueError(f"length: {length} is out of range; this model reads 1 to {limit or 'any number of'} tokens.")
    return length
