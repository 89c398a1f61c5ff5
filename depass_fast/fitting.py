"""Every run takes its workspace from its plan, and is refused before any work where it cannot fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .adapters import Adapter
from .backends import StreamBackend, choose, make_backend
from .backends.torch import default_budget
from .components import ComponentKind
from .given import Custom
from .job_size import layer_sizes
from .memory import available, readable
from .options import Options, Run
from .planner import RESIDENT, Plan, plan

_SMALL = 256 << 20  # bytes that there always are, or else running out of them is dealt with
_LEAST = 1 << 20  # bytes of workspace below which nothing sensible can be done


def fitted(
    run: Run,
    adapter: Adapter,
    lengths: Sequence[int],
    kind: ComponentKind,
    options: Options,
    end: int | None,
    traced: bool,
) -> Run:
    """The run with the workspace that the device has room for.

    Raises:
        MemoryError: not even the state and the trace fit; what does is in the message.
    """
    name, device = run.backend.name, adapter.device
    if _is_small(adapter, lengths, kind):
        return run
    made = plan(adapter, lengths, kind, options, end=end, traced=traced)
    free = made.available_bytes
    if free is None or made.upper_bound:
        return run
    need, workspace = least_bytes(made, name), made.of(name).workspace_bytes
    may_stream = _may_stream(run, adapter, options)
    if need > free and options.stream == "auto" and device.type != "cpu" and may_stream:
        streamed, host = made.of("torch, streamed"), available(torch.device("cpu"))
        possible = not callable(options.allocation) and (host is None or streamed.host_bytes <= host)
        if possible and least_bytes(made, streamed.backend) <= free:
            return replace(run, backend=StreamBackend(device, run.backend.compute_dtype, options.memory_budget))
    if need > free:
        raise MemoryError(_refusal(made, adapter, lengths, kind, options, end, traced, name, may_stream))
    room = free - (need - min(workspace, _LEAST))
    if name not in RESIDENT or options.memory_budget is not None or workspace <= room:
        return run
    budget = max(_LEAST, default_budget(device) * room // (2 * workspace))
    return replace(run, backend=make_backend(name, run.backend.compute_dtype, budget))


def _may_stream(run: Run, adapter: Adapter, options: Options) -> bool:
    """Whether the state may stream, which is the torch backend's: not where another one was asked for by name."""
    if run.backend.name != "triton":
        return run.backend.name == "torch"
    return choose(options.backend, adapter.device, run.compute_dtype).automatic


def _is_small(adapter: Adapter, lengths: Sequence[int], kind: ComponentKind) -> bool:
    """Whether a run so surely fits anywhere that planning it, a few milliseconds, would be wasted."""
    sizes, longest = layer_sizes(adapter), max(lengths)
    counts = {"tokens": longest, "heads": max(size.o for size in sizes), "modules": 2}
    counts["neurons"] = max(sum(neurons for neurons, _ in size.mlps) for size in sizes)
    if kind.kind not in counts:
        return False
    width = adapter.hidden_size * (counts[kind.kind] + 4 * len(sizes)) + sum(size.neurons for size in sizes)
    most, free = 16 * sum(lengths) * width, available(adapter.device)
    return most <= _SMALL and (free is None or most <= free // 8)


def least_bytes(made: Plan, backend: str) -> int:
    """Bytes below which a run cannot be done whatever its workspace."""
    estimate = made.of(backend)
    if backend == "reference":
        return estimate.peak_bytes
    return estimate.peak_bytes - max(0, estimate.workspace_bytes - _LEAST)


def _refusal(
    made: Plan,
    adapter: Adapter,
    lengths: Sequence[int],
    kind: ComponentKind,
    options: Options,
    end: int | None,
    traced: bool,
    name: str,
    may_stream: bool,
) -> str:
    """What the backend ``name`` needs, what there is, and what would fit."""
    free, named = made.available_bytes, "backend='torch', "

    def fits(lengths: Sequence[int], options: Options = options) -> int | None:
        need = least_bytes(plan(adapter, lengths, kind, options, end=end, traced=traced), name)
        return need if need <= free else None

    ways = []
    if name == "reference" and (need := least_bytes(made, "torch")) <= free:
        ways.append(f"backend='torch' ({readable(need)})")
    if name in RESIDENT and adapter.device.type != "cpu" and not callable(options.allocation):
        need = least_bytes(made, "torch, streamed")
        if need <= free and not (may_stream and options.stream == "auto"):
            ways.append(f"{'' if may_stream else named}stream=True ({readable(need)})")
    for dtype in (torch.float32, torch.bfloat16):
        if dtype.itemsize < getattr(torch, made.state_dtype).itemsize:
            need = fits(lengths, replace(options, state_dtype=dtype))
            if need is not None:
                ways.append(f"state_dtype='{str(dtype).removeprefix('torch.')}' ({readable(need)})")
                break
    ordered = sorted(lengths, reverse=True)
    several = [k for k in range(1, len(lengths)) if fits(ordered[:k]) is not None] if not traced else []
    if several:
        ways.append(f"{several[-1]} of these {len(lengths)} prompts at a time")
    if not isinstance(kind, Custom) and not several and not traced:
        low, high = 0, max(lengths)
        while high - low > 1:  # the longest prompt that fits
            middle = (low + high) // 2
            low, high = (middle, high) if fits([middle]) is not None else (low, middle)
        if low:
            ways.append(f"a prompt of {low} tokens ({readable(fits([low]))})")
    what = f"the state takes {readable(made.state_bytes)}, the trace {readable(made.trace_bytes)}"
    ways = (
        f"It fits with {', or with '.join(ways)}." if ways else "Take a shorter prompt or a machine with more memory."
    )
    need = f"needs {readable(least_bytes(made, name))} on {made.device} and {readable(free)} are available"
    return f"{made.components}: {need}: {what}. {ways}"
