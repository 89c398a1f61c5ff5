"""Every run takes its workspace from its plan, and is refused before any work where it cannot fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..adapters import Adapter
from ..backends import StreamBackend, choose_backend, make_backend
from ..backends.torch.division import default_budget
from ..components.base import ComponentKind
from ..components.given import Custom
from ..options import Adjoint, Options
from ..propagation.run import Run
from ..runtime.memory import available, readable
from .adjoint import SweepOutlook, foresee
from .exact import JOINTLY
from .plan import Plan
from .planner import plan
from .shapes import fewest_components, layer_sizes, named_components

_SMALL = 256 << 20  # bytes that there always are, or else running out of them is dealt with
STREAMED = StreamBackend.name
_LEAST = 1 << 20  # bytes of workspace below which nothing sensible can be done


@dataclass(frozen=True)
class RunShape:
    """What a run is to be fitted for; ``counts`` are the named components of every prompt, or bounds of them."""

    adapter: Adapter
    lengths: Sequence[int]
    kind: ComponentKind
    options: Options
    end: int | None
    traced: bool
    counts: Sequence[int] | None = None
    method: Adjoint | None = None

    def plan(self) -> Plan:
        more = {"end": self.end, "traced": self.traced, "counts": self.counts, "method": self.method}
        return plan(self.adapter, self.lengths, self.kind, self.options, **more)

    def with_lengths(self, lengths: Sequence[int]) -> RunShape:
        """The same for other prompts, of which the longest have most components."""
        counts = None if self.counts is None else [max(self.counts)] * len(lengths)
        return replace(self, lengths=lengths, counts=counts)


def fitted(run: Run, asked: RunShape) -> Run:
    """The run with the workspace that the device has room for.

    How many components a dictionary or experts have is known only with the trace: without ``counts`` a run of these is
    refused where not even the fewest fit, and else left as it is.

    Raises:
        MemoryError: not even the state and the trace fit; what does is in the message.
    """
    adapter, kind = asked.adapter, asked.kind
    if _is_small(asked):
        return run
    known = asked.counts is not None or all(named_components(one, adapter, 1)[1] for one in kind.each(adapter))
    if not known:
        asked = replace(asked, counts=[fewest_components(kind, adapter)] * len(asked.lengths))
    fit = _fitted_sweep if asked.method is not None else _fitted_state
    if not known and fit is _fitted_sweep:  # its tables are of as many experts as there may be: only the trace is sure
        free = available(adapter.device)
        if free is None or _is_spread(adapter) or asked.plan().trace_bytes <= free:
            return run
    found = fit(run, asked)
    return found if known else run


def _fitted_state(run: Run, asked: RunShape) -> Run:
    name, device, options = run.backend.name, asked.adapter.device, asked.options
    made = asked.plan()
    free = made.available_bytes
    if free is None or made.upper_bound:
        return run
    short, may_stream = _shortage(made, name), _may_stream(run, asked.adapter, options)
    may_stream &= not callable(options.allocation) and not _is_spread(asked.adapter)
    on_cpu = device.type == "cpu"
    if short and options.stream == "auto" and may_stream and not on_cpu and not _shortage(made, STREAMED):
        name, short = STREAMED, None
    if short:
        raise MemoryError(_refusal(made, asked, name, short, may_stream))
    workspace, budget = made.of(name).workspace_bytes, options.memory_budget
    room = free - (made.of(name).peak_bytes - workspace)  # less than that: not the forward pass is the peak
    if name != "reference" and budget is None and workspace > room:
        budget = max(_LEAST, default_budget(device) * room // (2 * workspace))
    elif name == run.backend.name:
        return run
    compute = run.backend.compute_dtype
    backend = StreamBackend(device, compute, budget) if name == STREAMED else make_backend(name, compute, budget)
    return replace(run, backend=backend)


def _shortage(made: Plan, name: str) -> str | None:
    """What the backend ``name`` needs and what there is, where that is not enough for it."""
    need, host = least_bytes(made, name), available(torch.device("cpu"))
    if need > made.available_bytes:
        return f"needs {readable(need)} on {made.device} and {readable(made.available_bytes)} are available"
    held = made.of(name).host_bytes
    if held and host is not None and held > host:
        return f"needs {readable(held)} in host memory and {readable(host)} are available"
    return None


def _is_spread(adapter: Adapter) -> bool:
    """Whether layers lie on several devices: no plan says what a sweep holds on one, and states stream to one only."""
    return len({adapter.layer_device(index) for index in range(adapter.n_layers)}) > 1


def _fitted_sweep(run: Run, asked: RunShape) -> Run:
    """A sweep begins with the workspace that there is room for, if many components are loud, or at least if none is.

    One that was asked for is left as it is: where memory runs out it is halved, and that is said.
    """
    free = available(asked.adapter.device)
    if free is None:
        return run
    outlook = _outlook(asked)
    usual = outlook.default_workspace(free)
    if outlook.peak(usual, None) > free and _is_spread(asked.adapter):
        return run
    for loud in (None, 0):
        workspace, smallest = usual, outlook.smallest(usual)
        while workspace > smallest and outlook.peak(workspace, loud) > free:
            workspace //= 2
        if outlook.peak(workspace, loud) <= free:
            return run if asked.options.memory_budget or workspace == usual else replace(run, memory_budget=workspace)
    raise MemoryError(_refusal_of_sweep(asked, free))


def _outlook(asked: RunShape) -> SweepOutlook:
    more = {"end": asked.end, "device": asked.adapter.device, "traced": asked.traced, "counts": asked.counts}
    return foresee(asked.adapter, asked.lengths, asked.kind, asked.options, asked.method, **more)


def _refusal_of_sweep(asked: RunShape, free: int) -> str:
    """What a sweep needs with the smallest workspace, what there is, and what would fit."""

    def need(asked: RunShape) -> int:
        outlook = _outlook(asked)
        return outlook.peak(outlook.smallest(outlook.default_workspace(free)), 0)

    def fits(asked: RunShape) -> int | None:
        return found if (found := need(asked)) <= free else None

    ways, method = [], asked.method
    if method.refine:
        few = _largest(method.refine, lambda k: fits(replace(asked, method=replace(method, refine=k))))
        fewer = replace(asked, method=replace(method, refine=few or 0))
        if few or fits(fewer) is not None:
            ways.append(f"refine={few or 0} ({readable(need(fewer))})")
    if method.sample and not ways:
        none = replace(asked, method=replace(method, refine=0, sample=0))
        if (size := fits(none)) is not None:
            ways.append(f"{'refine=0, ' if method.refine else ''}sample=0 ({readable(size)})")
    if _outlook(asked).wide == torch.float64:
        narrow = replace(asked, options=replace(asked.options, state_dtype=torch.float32))
        if (size := fits(narrow)) is not None:
            ways.append(f"state_dtype='float32' ({readable(size)})")
    ways += _smaller_prompts(asked, fits)
    outlook = _outlook(asked)
    made_of = f"the trace takes {readable(outlook.forward.trace)}"
    device = asked.adapter.device
    return (
        f"{asked.kind.kind}, adjoint: needs {readable(need(asked))} on {device}, however small the workspace, and "
        f"{readable(free)} are available: {made_of}. {_advice(ways)}"
    )


def _may_stream(run: Run, adapter: Adapter, options: Options) -> bool:
    """Whether the state may stream, which is the torch backend's: not where another one was asked for by name."""
    return run.backend.streamable or choose_backend(options.backend, adapter.device, run.compute_dtype).automatic


def _is_small(asked: RunShape) -> bool:
    """Whether a run so surely fits anywhere that planning it, a few milliseconds, would be wasted."""
    adapter, lengths, kind = asked.adapter, asked.lengths, asked.kind.kind
    sizes, longest = layer_sizes(adapter), max(lengths)
    counts = {"tokens": longest, "heads": max(size.o for size in sizes), "modules": 2}
    counts["neurons"] = max(sum(neurons for neurons, _ in size.mlps) for size in sizes)
    if kind not in counts:
        return False
    width = adapter.hidden_size * (counts[kind] + 4 * len(sizes)) + sum(size.neurons for size in sizes)
    most, free = 16 * sum(lengths) * width, available(adapter.device)
    return most <= _SMALL and (free is None or most <= free // 8)


def least_bytes(made: Plan, backend: str) -> int:
    """Bytes below which a run cannot be done whatever its workspace."""
    estimate = made.of(backend)
    if backend == "reference":
        return estimate.peak_bytes
    return max(estimate.forward_bytes, estimate.peak_bytes - max(0, estimate.workspace_bytes - _LEAST))


def _refusal(made: Plan, asked: RunShape, name: str, short: str, may_stream: bool) -> str:
    """What is short for the backend ``name``, and what would fit."""
    named, options, adapter = "backend='torch', ", asked.options, asked.adapter

    def fits(asked: RunShape) -> int | None:
        made = asked.plan()
        return None if _shortage(made, name) else least_bytes(made, name)

    ways = []
    if name == "reference" and not _shortage(made, "torch"):
        ways.append(f"backend='torch' ({readable(least_bytes(made, 'torch'))})")
    if name in JOINTLY and adapter.device.type != "cpu" and not callable(options.allocation):
        asked_for = may_stream and options.stream == "auto"
        if not asked_for and not _shortage(made, STREAMED):
            ways.append(f"{'' if may_stream else named}stream=True ({readable(least_bytes(made, STREAMED))})")
    for dtype in (torch.float32, torch.bfloat16):
        if dtype.itemsize < getattr(torch, made.state_dtype).itemsize:
            need = fits(replace(asked, options=replace(options, state_dtype=dtype)))
            if need is not None:
                ways.append(f"state_dtype='{str(dtype).removeprefix('torch.')}' ({readable(need)})")
                break
    ways += _smaller_prompts(asked, fits)
    what = f"the state takes {readable(made.state_bytes)}, the trace {readable(made.trace_bytes)}"
    return f"{made.components}: {short}: {what}. {_advice(ways)}"


def _smaller_prompts(asked: RunShape, fits: Callable[[RunShape], int | None]) -> list[str]:
    """How many of the prompts fit together, or else the longest one that does; nothing where there is a trace."""
    if asked.traced:
        return []
    ordered = sorted(asked.lengths, reverse=True)
    several = [k for k in range(1, len(ordered)) if fits(asked.with_lengths(ordered[:k])) is not None]
    if several:
        return [f"{several[-1]} of these {len(ordered)} prompts at a time"]
    if isinstance(asked.kind, Custom):
        return []
    length = _largest(ordered[0], lambda n: fits(asked.with_lengths([n])))
    return [f"a prompt of {length} tokens ({readable(fits(asked.with_lengths([length])))})"] if length else []


def _largest(bound: int, fits: Callable[[int], int | None]) -> int:
    """The largest number below ``bound`` that fits, 0 where none does."""
    low, high = 0, bound
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) is not None else (low, middle)
    return low


def _advice(ways: list[str]) -> str:
    if not ways:
        return "Take a shorter prompt or a machine with more memory."
    return f"It fits with {', or with '.join(ways)}."
