"""What a decomposition will take, before it is run: FLOP, memory and time, from shapes alone (DESIGN.md section 5).

A plan needs no weights: the shapes come from a loaded model, or from one that is made of a config on torch's meta
device. Every run makes one before it does any work, takes its workspace from it, and refuses what cannot fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .adapters import Adapter
from .backends import backend_status
from .backends.torch import default_budget
from .components import ComponentKind, Tokens
from .gemm_rate import gemm_rate
from .hook_names import layer_input
from .job_size import Job, has_bias, layer_sizes, named_components
from .memory import available, readable
from .options import Options
from .prompts import encode_all
from .sweep import BYTES
from .trace import Trace
from .trace_size import bytes_per_position, without_weights

if TYPE_CHECKING:
    from .engine import DePass

# of the GEMM rate, as bench.cpu measures the torch backend
EFFICIENCY = {"torch": 0.75, "triton": 0.75, "reference": 0.25}
RESIDENT = ("torch", "triton")  # backends whose state is on the device, in jagged rows, and whose workspace is bounded
_INDEX = 40  # bytes of indices per row, held along with a state


@dataclass(frozen=True)
class Estimate:
    """What one backend needs: FLOP; bytes of workspace, and at the peak beyond the loaded model; seconds if known.

    ``host_bytes`` are what the peak does not hold, because the state streams from host memory.
    """

    backend: str
    flop: float
    workspace_bytes: int
    peak_bytes: int
    host_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """What a decomposition of prompts of ``lengths`` tokens will take. Sizes are in bytes, times in seconds.

    ``flop`` is the floor of DESIGN.md section 5 for the whole state, at all positions of all layers passed, attention
    included: a row meets (N + 1) / 2 keys. An attribution at one position spares most of the last layer.
    ``upper_bound`` says that how many components there are depends on the prompt (features of a dictionary, neurons of
    experts): then everything is at most this. ``seconds`` rest on ``gemm_flops``, FLOP per second of a GEMM, and on
    the share of it that a backend reaches; None without a rate.
    """

    components: str
    layer: int
    layers_passed: int
    lengths: tuple[int, ...]
    n_components: int  # of the longest prompt, `rest` and `bias` included
    rows: int
    hidden_size: int
    device: str
    dtype: str
    state_dtype: str
    compute_dtype: str
    flop: float
    weights_bytes: int
    trace_bytes: int
    state_bytes: int
    estimates: tuple[Estimate, ...]
    available_bytes: int | None
    gemm_flops: float | None
    rate_source: str
    upper_bound: bool

    def of(self, backend: str = "torch") -> Estimate:
        """The estimate for a backend. KeyError for one that there is not."""
        for estimate in self.estimates:
            if estimate.backend == backend:
                return estimate
        raise KeyError(f"no backend {backend!r} in this plan; it has {', '.join(e.backend for e in self.estimates)}")

    def fits(self, memory: int, backend: str = "torch") -> bool:
        """Whether a device with ``memory`` bytes in all holds the model and the run."""
        return self.weights_bytes + self.of(backend).peak_bytes <= memory

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values under the names that ``depass-fast plan --json`` prints."""
        return {**asdict(self), "lengths": list(self.lengths), "estimates": [asdict(e) for e in self.estimates]}

    def __str__(self) -> str:
        prompts = f"N={self.lengths[0]}" if len(self.lengths) == 1 else f"{len(self.lengths)} prompts, {_range(self)}"
        most = "at most " if self.upper_bound else ""
        rows = [
            ("components", f"{self.components} from layer {self.layer}, {prompts}, {most}{self.n_components:,}"),
            ("rows", f"{most}{self.rows:,} of {self.hidden_size} in {self.state_dtype}, {self.layers_passed} layers"),
            ("arithmetic", f"{_flop(self.flop)} at least, in {self.compute_dtype}"),
            ("weights", f"{readable(self.weights_bytes)} ({self.dtype})"),
            ("trace", readable(self.trace_bytes)),
            ("state", readable(self.state_bytes)),
        ]
        for e in self.estimates:
            host = f", {readable(e.host_bytes)} in host memory" if e.host_bytes else ""
            time = "" if e.seconds is None else f", about {_time(e.seconds)}"
            rows.append((e.backend, f"peak {readable(e.peak_bytes)} beyond the weights{host}{time}"))
        if self.available_bytes is not None:
            rows.append(("available", f"{readable(self.available_bytes)} on {self.device}"))
        if self.gemm_flops is not None:
            rows.append(("time from", f"{_flop(self.gemm_flops)}/s, {self.rate_source}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def plan(
    adapter: Adapter,
    lengths: Sequence[int],
    kind: ComponentKind,
    options: Options | None = None,
    *,
    end: int | None = None,
    device: torch.device | None = None,
    traced: bool = False,
    gemm_flops: float | None = None,
    rate_source: str = "given",
) -> Plan:
    """The plan of a decomposition of prompts of ``lengths`` tokens, carried to the input of layer ``end``.

    Args:
        adapter: of a model, with weights or without (:func:`for_config`).
        end: None: after the final norm.
        device: that it will run on. Default: the model's.
        traced: the trace exists already, and is no part of the peak.
        gemm_flops: FLOP per second of a large GEMM in the compute dtype; ``rate_source`` says where it comes from.

    Raises:
        ValueError, TypeError: components or options that this model does not have.
    """
    options = options or Options()
    device = device or adapter.device
    kind.check(adapter, lengths)
    if kind.is_layered:
        more = {"end": end, "device": device, "traced": traced, "gemm_flops": gemm_flops, "rate_source": rate_source}
        return _together([plan(adapter, lengths, one, options, **more) for one in kind.each(adapter)])
    state, compute = options.dtypes(adapter.dtype, device)
    budget = options.memory_budget or default_budget(device)
    layers, last = layer_sizes(adapter), adapter.n_layers if end is None else end
    site, first = kind.start_site(adapter), kind.resolve(adapter)
    entering = first + (site == "resid_post")
    if not entering <= last <= adapter.n_layers:
        raise ValueError(
            f"end: {end!r} is out of range; these components reach layers {entering} to {adapter.n_layers}."
        )
    extras = int(not isinstance(kind, Tokens)) + has_bias(kind, adapter, end)
    named, exact = zip(*(named_components(kind, adapter, n) for n in lengths), strict=True)
    counts = [n + extras for n in named]
    staggered = isinstance(kind, Tokens)
    rows = [n * (n + 1) // 2 + n * extras if staggered else n * m for n, m in zip(lengths, counts, strict=True)]
    keys = sum(r * (n + 1) / 2 for r, n in zip(rows, lengths, strict=True))  # that rows meet

    passed = [replace(size, skip_attention=site == "resid_mid" and i == first) for i, size in enumerate(layers)]
    passed = passed[entering:last]
    total, width = sum(rows), adapter.hidden_size
    flop = sum(size.flop(width, total, keys) for size in passed)
    trace = sum(lengths) * bytes_per_position(adapter, adapter.dtype)
    state_bytes = total * width * state.itemsize
    job = Job(sum(lengths), max(lengths), counts, total, width, state, compute, adapter.dtype, budget, passed, layers)
    given = 0 if traced else trace
    capture = 0 if traced else trace + job.capturing()
    forward = 0 if traced else 2 * job.positions * sum(size.parameters(width) for size in layers)
    dense = sum(n * m for n, m in zip(lengths, counts, strict=True))
    estimates, status = [], backend_status(device, torch.promote_types(state, compute))
    resident = (flop, job.workspace(), int(job.copies() * state_bytes) + total * _INDEX)
    for name, work, workspace, held in (
        *((name, *resident) for name in RESIDENT if status[name] is None),
        ("torch, streamed", flop + job.gates_again(), job.workspace(), 0),
        ("reference", flop * dense / max(1, total), job.dense_workspace(), state_bytes),
    ):
        interpreted = name == "triton" and device.type == "cpu"  # for tests: its time is nobody's
        known = gemm_flops is not None and not interpreted
        rate = gemm_flops * EFFICIENCY[name.partition(",")[0]] if known else None
        streamed = "streamed" in name
        estimates.append(
            Estimate(
                backend=name,
                flop=work,
                workspace_bytes=workspace,
                peak_bytes=max(capture, given + held + workspace + job.weight_copies() + job.activations()),
                host_bytes=int(job.copies() * state_bytes) if streamed else 0,
                seconds=None if rate is None else (work + forward) / rate,
            )
        )
    return Plan(
        components=kind.kind,
        layer=first,
        layers_passed=len(passed),
        lengths=tuple(lengths),
        n_components=max(counts),
        rows=total,
        hidden_size=width,
        device=str(device),
        dtype=_name(adapter.dtype),
        state_dtype=_name(state),
        compute_dtype=_name(compute),
        flop=flop,
        weights_bytes=sum(p.numel() * p.element_size() for p in adapter.model.parameters()),
        trace_bytes=trace,
        state_bytes=state_bytes,
        estimates=tuple(estimates),
        available_bytes=available(device),
        gemm_flops=gemm_flops,
        rate_source="" if gemm_flops is None else rate_source,
        upper_bound=not all(exact),
    )


def _together(plans: list[Plan]) -> Plan:
    """Several start layers in one sweep: at most, since states are held together as far as there is room."""
    first, states = plans[0], [made.state_bytes for made in plans]
    held = 2 * max(min(sum(states), BYTES), max(states))  # as they start, and joined
    estimates = []
    for parts in zip(*(made.estimates for made in plans), strict=True):
        seconds = [part.seconds for part in parts]
        peak = max(part.peak_bytes for part in parts) + (held if parts[0].backend in RESIDENT else 0)
        estimates.append(
            replace(
                parts[0],
                flop=sum(part.flop for part in parts),
                peak_bytes=peak,
                seconds=None if None in seconds else sum(seconds),
            )
        )
    return replace(
        first,
        layers_passed=sum(made.layers_passed for made in plans),
        rows=sum(made.rows for made in plans),
        flop=sum(made.flop for made in plans),
        state_bytes=sum(states),
        estimates=tuple(estimates),
        upper_bound=True,
    )


def for_config(config: Any, dtype: torch.dtype | None = None) -> Adapter:
    """An adapter to plan with, from transformers' config alone; ``dtype`` of the weights, by default the stored one.

    Raises:
        ValueError: the family is not supported.
    """
    adapter = without_weights(config)
    stored = config.dtype if hasattr(config, "dtype") else getattr(config, "torch_dtype", None)  # its older name
    adapter.model.to(dtype or stored or torch.float32)
    return adapter


def plan_call(
    dp: DePass, what: Any, kind: ComponentKind, end: int | str | None, measure: bool, overrides: dict[str, Any]
) -> Plan:
    """The plan of a call of :meth:`DePass.decompose`, or for a number of tokens in place of a prompt."""
    options, adapter = dp.options.updated(overrides), dp.adapter
    options.build(adapter)
    if not isinstance(kind, ComponentKind):
        raise TypeError(f"components: expected Tokens(), Heads(layer), ..., got {kind!r}.")
    traced = isinstance(what, Trace)
    if traced:
        lengths = [what.length(p) for p in range(what.n_prompts)]
    elif isinstance(what, int):
        lengths = [check_length(what, adapter)]
    else:
        lengths = [len(ids) for ids in encode_all(what, adapter, dp.tokenizer)[1]]
    rate, source = None, ""
    if measure:
        rate, source = gemm_rate(adapter.device, options.dtypes(adapter.dtype, adapter.device)[1])
    last = None if end is None else layer_input(end, "end")
    return plan(adapter, lengths, kind, options, end=last, traced=traced, gemm_flops=rate, rate_source=source)


def check_length(length: int, adapter: Adapter) -> int:
    """A number of tokens that the model can read. ValueError where it cannot."""
    limit = adapter.context_length
    if isinstance(length, bool) or length < 1 or (limit is not None and length > limit):
        raise ValueError(f"length: {length} is out of range; this model reads 1 to {limit or 'any number of'} tokens.")
    return length


# -- words ----------------------------------------------------------------------------------------------------------


def _range(plan: Plan) -> str:
    return f"N={min(plan.lengths)} to {max(plan.lengths)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _flop(count: float) -> str:
    for unit in ("MFLOP", "GFLOP", "TFLOP"):
        count /= 1e6 if unit == "MFLOP" else 1e3
        if count < 1000:
            return f"{count:.3g} {unit}"
    return f"{count / 1e3:.3g} PFLOP"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
