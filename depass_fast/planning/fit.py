"""The fit of a run: its workspace comes from its plan, and a run that cannot fit raises before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import torch

from ..backends import Backend, ReferenceBackend, ShardBackend, StreamBackend, choose_backend, make_backend
from ..backends.shard import shard_name
from ..backends.torch.division import default_budget
from ..components.custom import Custom
from ..options import is_spread
from ..propagation.run import Run
from ..runtime.dtypes import dtype_name
from ..runtime.memory import available, readable
from .adjoint import SweepOutlook, sweep_outlook
from .exact import JOINTLY
from .ledger import LedgerOutlook, ledger_outlook
from .plan import Plan
from .planner import make_plan
from .shapes import RunShape, fewest_components, layer_sizes, named_components

_SMALL = 256 << 20  # bytes that there always are, or else running out of them is dealt with
STREAMED = StreamBackend.name
_LEAST_WORKSPACE = 1 << 20  # bytes of workspace below which nothing sensible can be done
_DOUBLED = 7  # times that the ranks are doubled in search of a number that fits


def fitted(run: Run, shape: RunShape) -> Run:
    """Return the run with a workspace that fits on the device.

    How many components a dictionary or experts have is known only with the trace. Without ``counts`` such a run is
    refused where not even the fewest fit, and else left as it is.

    Raises:
        MemoryError: not even the state and the trace fit; the message says what is short and what would fit.
    """
    adapter, kind = shape.adapter, shape.kind
    if _is_small(shape):
        return run
    fit = _fitted_way_back if shape.is_linear else _fitted_state if shape.method is None else _fitted_sweep
    if shape.counts is not None or all(named_components(one, adapter, 1)[1] for one in kind.each(adapter)):
        return fit(run, shape)
    fewest = replace(shape, counts=[fewest_components(kind, adapter)] * len(shape.lengths))
    has_tables = shape.method is not None and not shape.is_linear
    if not has_tables or not _trace_fits(fewest):  # a sweep's tables are as wide as all experts: too wide to tell
        fit(run, fewest)
    return run


def _trace_fits(shape: RunShape) -> bool:
    """True unless the trace alone is known to be too large."""
    free = available(shape.adapter.device)
    return free is None or is_spread(shape.adapter) or make_plan(shape).trace_bytes <= free


def _fitted_state(run: Run, shape: RunShape) -> Run:
    name, device, options = run.backend.name, shape.adapter.device, shape.options
    plan = make_plan(shape)
    free = plan.available_bytes
    if free is None or plan.upper_bound:
        return run
    streamed = STREAMED if shape.ranks is None else shard_name(shape.ranks, True)
    if short := _shortage(plan, name):
        may_replace = _may_replace(run, shape)
        streams = may_replace and options.stream == "auto" and _can_stream(shape)
        if not streams or _shortage(plan, streamed):
            raise MemoryError(_refusal(plan, shape, name, short, may_replace))
        name = streamed
    workspace, budget = plan.of(name).workspace_bytes, options.memory_budget
    left = free - (plan.of(name).peak_bytes - workspace)  # less than that: not the forward pass is the peak
    if run.workspace(device) is not None and budget is None and workspace > left:
        budget = max(_LEAST_WORKSPACE, default_budget(device) * left // (2 * workspace))
    elif name == run.backend.name:
        return run
    return replace(run, backend=_made(run, name, device, budget))


def _made(run: Run, name: str, device: torch.device, budget: int | None) -> Backend:
    """Return the backend ``name`` with a workspace, for a run that has it or another one."""
    compute = run.compute_dtype
    if run.ranks is not None:
        return ShardBackend(run.ranks, device, compute, budget, name == shard_name(run.ranks.size, True))
    return StreamBackend(device, compute, budget) if name == STREAMED else make_backend(name, compute, budget)


def _shortage(plan: Plan, name: str) -> str | None:
    """Say what the backend ``name`` needs and what there is; None if that is enough for it."""
    need, free, host = least_bytes(plan, name), plan.available_bytes, available(torch.device("cpu"))
    if free is not None and need > free:
        return f"needs {readable(need)} on {plan.device} and {readable(free)} are available"
    held = plan.of(name).host_bytes
    if held and host is not None and held > host:
        return f"needs {readable(held)} in host memory and {readable(host)} are available"
    return None


def _fitted_sweep(run: Run, shape: RunShape) -> Run:
    """Give a sweep the workspace with which it fits however many components are loud.

    Where there is none, the workspace is that with which it fits if no component is loud.

    A workspace that was asked for is left as it is: where memory runs out the sweep halves it, and says so.
    """
    free = available(shape.adapter.device)
    if free is None:
        return run
    outlook = sweep_outlook(shape)
    usual = outlook.default_workspace(free)
    if outlook.peak(usual, None) > free and is_spread(shape.adapter):
        return run
    for loud in (None, 0):
        workspace = outlook.fitting_workspace(free, loud)
        if workspace is not None:
            return run if shape.options.memory_budget or workspace == usual else replace(run, memory_budget=workspace)
    raise MemoryError(_refusal_of_sweep(shape, outlook, free))


def _fitted_way_back(run: Run, shape: RunShape) -> Run:
    """Give a way back the workspace with which it fits; one that was asked for is left as it is, as a sweep's is."""
    free = available(shape.adapter.device)
    if free is None:
        return run
    outlook = ledger_outlook(shape)
    if outlook.peak(outlook.default_workspace) <= free or is_spread(shape.adapter):
        return run
    workspace = outlook.fitting_workspace(free)
    if workspace is None:
        raise MemoryError(_refusal_of_way_back(shape, outlook, free))
    return run if shape.options.memory_budget else replace(run, memory_budget=workspace)


def _may_replace(run: Run, shape: RunShape) -> bool:
    """True if the streaming backend may take the place of the run's: it is torch, or nobody asked for it by name."""
    streamable = run.backend.streamable
    return streamable or choose_backend(shape.options.backend, shape.adapter.device, run.compute_dtype).automatic


def _can_stream(shape: RunShape) -> bool:
    """True if there is a device beside the host's memory, and nothing that needs all components at once on it."""
    has_device = shape.adapter.device.type != "cpu"
    return has_device and not callable(shape.options.allocation) and not is_spread(shape.adapter)


def _is_small(shape: RunShape) -> bool:
    """True if a run so surely fits anywhere that planning it, a few milliseconds, would be wasted."""
    adapter, lengths, kind = shape.adapter, shape.lengths, shape.kind.kind
    sizes, longest = layer_sizes(adapter), max(lengths)
    counts = {"tokens": longest, "heads": max(size.o for size in sizes), "modules": 2}
    counts["neurons"] = max(sum(neurons for neurons, _ in size.mlps) for size in sizes)
    if kind not in counts:
        return False
    width = adapter.stream_width * (counts[kind] + 4 * len(sizes) * shape.gradients)
    width += shape.gradients * sum(size.neurons for size in sizes)
    most, free = 16 * sum(lengths) * width, available(adapter.device)
    return most <= _SMALL and (free is None or most <= free // 8)


def least_bytes(plan: Plan, backend: str) -> int:
    """Return the bytes below which a run cannot be done whatever its workspace."""
    estimate = plan.of(backend)
    if backend == ReferenceBackend.name:  # whose workspace is not bounded
        return estimate.peak_bytes
    return max(estimate.forward_bytes, estimate.peak_bytes - max(0, estimate.workspace_bytes - _LEAST_WORKSPACE))


# -- refusals ---------------------------------------------------------------------------------------------------------

Fits = Callable[[RunShape, str], int | None]  # the bytes that a run needs with a backend, None where it does not fit


def _refusal(plan: Plan, shape: RunShape, name: str, short: str, may_replace: bool) -> str:
    """The message for the backend ``name``: what is short, and what would fit."""

    def fits(other: RunShape, name: str) -> int | None:
        plan = make_plan(other)
        return None if _shortage(plan, name) else least_bytes(plan, name)

    parts = f"the state takes {readable(plan.state_bytes)}, the trace {readable(plan.trace_bytes)}"
    return f"{plan.components}: {short}: {parts}. {_advice(_ways(shape, name, may_replace, fits))}"


def _ways(shape: RunShape, name: str, may_replace: bool, fits: Fits) -> Iterator[str]:
    """Changes of an exact run with the backend ``name`` that make it fit, each found to do so by a plan."""
    options, adapter = shape.options, shape.adapter
    if shape.ranks is not None:
        yield from _ways_of_ranks(shape, shape.ranks, name, fits)
    elif name not in (*JOINTLY, STREAMED) and (need := fits(shape, "torch")):
        yield f"backend='torch' ({readable(need)})"
    was_tried = may_replace and options.stream == "auto"
    if name in JOINTLY and _can_stream(shape) and not was_tried and (need := fits(shape, STREAMED)):
        words = "stream=True" if may_replace else "backend='torch', stream=True"
        yield f"{words} ({readable(need)})"
    state = options.dtypes(adapter.dtype, adapter.device)[0]
    for dtype in (torch.float32, torch.bfloat16):
        if dtype.itemsize < state.itemsize and (need := fits(shape.with_state_dtype(dtype), name)):
            yield f"state_dtype='{dtype_name(dtype)}' ({readable(need)})"
            break
    yield from _smaller_prompts(shape, name, fits)


def _ways_of_ranks(shape: RunShape, ranks: int, name: str, fits: Fits) -> Iterator[str]:
    """Changes of a sharded run that make it fit: more ranks, of which each needs less, or host memory."""
    streams = name == shard_name(ranks, True)
    for more in (ranks << k for k in range(1, _DOUBLED)):
        if need := fits(replace(shape, ranks=more), shard_name(more, streams)):
            yield f"{more} ranks ({readable(need)} on each)"
            break
    is_allowed = shape.options.stream is False and _can_stream(shape)  # else it was tried
    if not streams and is_allowed and (need := fits(shape, shard_name(ranks, True))):
        yield f"stream=True ({readable(need)})"


def _refusal_of_sweep(shape: RunShape, outlook: SweepOutlook, free: int) -> str:
    """The message for a sweep: what it needs with the smallest workspace, what there is, and what would fit."""

    def fits(other: RunShape, name: str) -> int | None:
        need = sweep_outlook(other).least(free)
        return need if need <= free else None

    return (
        f"{shape.kind.kind}, adjoint: needs {readable(outlook.least(free))} on {shape.adapter.device}, however small "
        f"the workspace, and {readable(free)} are available: the trace takes {readable(outlook.forward.trace)}. "
        f"{_advice(_ways_of_sweep(shape, outlook, fits))}"
    )


def _ways_of_sweep(shape: RunShape, outlook: SweepOutlook, fits: Fits) -> Iterator[str]:
    """Changes of a sweep that make it fit, each found to do so by an outlook of its own."""
    assert shape.method is not None
    screening = replace(shape.method, refine=0, sample=0)
    if shape.method != screening and (need := fits(replace(shape, method=screening), "adjoint")):
        yield f"method=Adjoint(refine=0, sample=0) ({readable(need)})"
    if outlook.wide == torch.float64 and (need := fits(shape.with_state_dtype(torch.float32), "adjoint")):
        yield f"state_dtype='float32' ({readable(need)})"
    yield from _smaller_prompts(shape, "adjoint", fits)


def _refusal_of_way_back(shape: RunShape, outlook: LedgerOutlook, free: int) -> str:
    """The message for a way back under a linear rule."""

    def fits(other: RunShape, name: str) -> int | None:
        need = ledger_outlook(other).least()
        return need if need <= free else None

    name = "ledger" if shape.is_ledger else f"{shape.kind.kind}, adjoint"
    return (
        f"{name}: needs {readable(outlook.least())} on {shape.adapter.device}, however small the workspace, and "
        f"{readable(free)} are available: the trace takes {readable(outlook.forward.trace)}, what is kept "
        f"{readable(outlook.work.kept)}. {_advice(_ways_of_way_back(shape, outlook, fits))}"
    )


def _ways_of_way_back(shape: RunShape, outlook: LedgerOutlook, fits: Fits) -> Iterator[str]:
    """Changes of a way back that make it fit, each found to do so by an outlook of its own."""
    if shape.gradients > 1 and (need := fits(replace(shape, gradients=1), "adjoint")):
        yield f"one target and one position at a time ({readable(need)})"
    if shape.is_ledger and (need := fits(replace(shape, is_ledger=False), "adjoint")):
        yield f"attribute(..., allocation={outlook.work.rule!r}) of a kind at a time ({readable(need)})"
    if outlook.state == torch.float64 and (need := fits(shape.with_state_dtype(torch.float32), "adjoint")):
        yield f"state_dtype='float32' ({readable(need)})"
    yield from _smaller_prompts(shape, "adjoint", fits)


def _smaller_prompts(shape: RunShape, name: str, fits: Fits) -> Iterator[str]:
    """One of several prompts at a time, or half of the only one; nothing where the trace exists already."""
    longest, n_prompts = max(shape.lengths), len(shape.lengths)
    is_rigid = n_prompts == 1 and (longest == 1 or isinstance(shape.kind, Custom))  # components of so many tokens
    if shape.traced or is_rigid:
        return
    length = longest if n_prompts > 1 else longest // 2
    if need := fits(shape.with_lengths([length]), name):
        words = f"one of these {n_prompts} prompts at a time" if n_prompts > 1 else f"a prompt of {length} tokens"
        yield f"{words} ({readable(need)})"


def _advice(ways: Iterator[str]) -> str:
    """The first two of ``ways``; no plan is made for more."""
    chosen = list(islice(ways, 2))
    if not chosen:
        return "Take a shorter prompt or a machine with more memory."
    return f"It fits with {', or with '.join(chosen)}."
