"""What a decomposition will take, before it is run: FLOP, memory and time, from shapes alone (DESIGN.md section 5).

A plan needs no weights: the shapes come from a loaded model, or from one that is made of a config on torch's meta
device. Every run makes one before it does any work, takes its workspace from it, and refuses what cannot fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from .adapters import Adapter
from .backends import StreamBackend, make_backend, resolve
from .backends.torch import default_budget
from .components import ComponentKind, Custom, Neurons, Tokens
from .features import Features
from .gemm_rate import gemm_rate
from .hook_names import layer_input
from .initial import meets_bias
from .memory import available, readable
from .options import Options, Run
from .prompts import encode, is_batch
from .trace import Trace
from .trace_size import bytes_per_position, without_weights

if TYPE_CHECKING:
    from .engine import DePass

EFFICIENCY = {"torch": 0.75, "reference": 0.25}  # of the GEMM rate, as bench.cpu measures the torch backend
_INDEX = 40  # bytes of indices per row, held along with a state
_LEAST = 1 << 20  # bytes of workspace below which nothing sensible can be done


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
    state, compute = options.dtypes(adapter.dtype, device)
    budget = options.memory_budget or default_budget(device)
    layers, last = _sizes(adapter), adapter.n_layers if end is None else end
    site, first = kind.start_site(adapter), kind.resolve(adapter)
    entering = first + (site == "resid_post")
    extras = int(not isinstance(kind, Tokens)) + _has_bias(kind, adapter, end)
    named, exact = zip(*(_named(kind, adapter, n) for n in lengths), strict=True)
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
    job = _Job(sum(lengths), max(lengths), counts, total, width, state, compute, adapter.dtype, budget, passed, layers)
    given = 0 if traced else trace
    capture = 0 if traced else trace + job.capturing()
    forward = 0 if traced else 2 * job.positions * sum(size.parameters(width) for size in layers)
    dense = sum(n * m for n, m in zip(lengths, counts, strict=True))
    estimates = []
    for name, work, workspace, held in (
        ("torch", flop, job.workspace(), int(job.copies() * state_bytes) + total * _INDEX),
        ("torch, streamed", flop + job.gates_again(), job.workspace(), 0),
        ("reference", flop * dense / max(1, total), job.dense_workspace(), state_bytes),
    ):
        rate = None if gemm_flops is None else gemm_flops * EFFICIENCY[name.partition(",")[0]]
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
        rate_source=rate_source,
        upper_bound=not all(exact),
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
        prompts = what if is_batch(what) else [what]
        lengths = [len(encode(p, adapter, dp.tokenizer)) for p in prompts]
    rate, source = None, ""
    if measure:
        rate, source = gemm_rate(adapter.device, options.dtypes(adapter.dtype, adapter.device)[1])
    last = None if end is None else layer_input(end, "end")
    return plan(
        adapter, lengths, kind, options, end=last, traced=traced, gemm_flops=rate, rate_source=source
    )


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
    made = plan(adapter, lengths, kind, options, end=end, traced=traced)
    free = made.available_bytes
    if free is None or made.upper_bound:
        return run
    need, workspace = _least(made, name), made.of(name).workspace_bytes
    if need > free and options.stream == "auto" and device.type != "cpu" and name == "torch":
        streamed, host = made.of("torch, streamed"), available(torch.device("cpu"))
        possible = not callable(options.allocation) and (host is None or streamed.host_bytes <= host)
        if possible and _least(made, streamed.backend) <= free:
            return replace(run, backend=StreamBackend(device, run.backend.compute_dtype, options.memory_budget))
    if need > free:
        raise MemoryError(_refusal(made, adapter, lengths, kind, options, end, traced))
    room = free - (need - min(workspace, _LEAST))
    if name != "torch" or options.memory_budget is not None or workspace <= room:
        return run
    budget = max(_LEAST, default_budget(device) * room // (2 * workspace))
    return replace(run, backend=make_backend(name, run.backend.compute_dtype, budget))


def _least(made: Plan, backend: str) -> int:
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
) -> str:
    """What is needed, what there is, and what would fit."""
    name, free = "torch, streamed" if options.stream is True else resolve(options.backend), made.available_bytes

    def fits(lengths: Sequence[int], options: Options = options) -> int | None:
        need = _least(plan(adapter, lengths, kind, options, end=end, traced=traced), name)
        return need if need <= free else None

    ways = []
    if name == "reference" and (need := _least(made, "torch")) <= free:
        ways.append(f"backend='torch' ({readable(need)})")
    for dtype in (torch.float32, torch.bfloat16):
        if dtype.itemsize < getattr(torch, made.state_dtype).itemsize:
            need = fits(lengths, replace(options, state_dtype=dtype))
            if need is not None:
                ways.append(f"state_dtype='{_name(dtype)}' ({readable(need)})")
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
    ways = f"It fits with {', or with '.join(ways)}." if ways else "Take a shorter prompt or a machine with more memory."
    return (
        f"{made.components}: needs {readable(_least(made, name))} on {made.device} and {readable(free)} are available: "
        f"{what}. {ways}"
    )


def check_length(length: int, adapter: Adapter) -> int:
    """A number of tokens that the model can read. ValueError where it cannot."""
    limit = adapter.context_length
    if isinstance(length, bool) or length < 1 or (limit is not None and length > limit):
        raise ValueError(f"length: {length} is out of range; this model reads 1 to {limit or 'any number of'} tokens.")
    return length


# -- shapes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Size:
    """The widths of one layer: of V, of what O reads, and of every MLP with the share of positions sent to it."""

    v: int
    o: int
    mlps: tuple[tuple[int, float], ...]
    copied: bool  # a parallel layer, or several MLPs: they read a copy of the state
    has_up: bool
    output_norms: bool
    skip_attention: bool = False

    def flop(self, width: int, rows: int, keys: float) -> float:
        attention = 0 if self.skip_attention else 2 * width * (self.v + self.o) * rows + 2 * self.o * keys
        return attention + rows * sum(4 * width * neurons * share for neurons, share in self.mlps)

    def gates(self, width: int, rows: int) -> float:
        return rows * sum(2 * width * neurons * share for neurons, share in self.mlps)

    def parameters(self, width: int) -> float:
        """Weights that a position meets on its way."""
        return width * (2 * self.v + 2 * self.o + sum((3 if self.has_up else 2) * n * share for n, share in self.mlps))

    @property
    def neurons(self) -> int:
        return max(neurons for neurons, _ in self.mlps)


_known: WeakKeyDictionary = WeakKeyDictionary()


def _sizes(adapter: Adapter) -> list[_Size]:
    if adapter.model not in _known:
        _known[adapter.model] = [_size(adapter, index) for index in range(adapter.n_layers)]
    return _known[adapter.model]


def _size(adapter: Adapter, index: int) -> _Size:
    layer, experts = adapter.layer(index), adapter.family.experts
    attention, mlps = layer.attention, layer.mlps
    routed = sum(mlp.name not in ("", "shared") for mlp in mlps)
    shares = [experts.top_k / routed if mlp.name not in ("", "shared") else 1.0 for mlp in mlps]
    gated = getattr(adapter.module(index, "mlp"), "up_proj", None) is not None or routed > 0
    return _Size(
        v=attention.n_kv_heads * attention.head_dim,
        o=attention.n_heads * attention.head_dim,
        mlps=tuple((mlp.w_gate.shape[0], share) for mlp, share in zip(mlps, shares, strict=True)),
        copied=layer.parallel or len(mlps) > 1,
        has_up=gated,
        output_norms=layer.mlp.output is not None or layer.mlp.factor != 1.0,
    )


def _named(kind: ComponentKind, adapter: Adapter, length: int) -> tuple[int, bool]:
    """How many components a prompt will have, without the extras, and whether that is known before it is traced."""
    if isinstance(kind, Neurons):
        mlps = _sizes(adapter)[kind.resolve(adapter)].mlps
        sent = [n for n, share in mlps if share < 1]
        reached = min(len(sent), round(length * sum(share for _, share in mlps if share < 1)))
        return sum(n for n, share in mlps if share == 1) + reached * (max(sent) if sent else 0), not sent
    if isinstance(kind, Features):
        return kind.sae.W_dec.shape[0], False
    return len(kind.names(adapter, [""] * length)), True


def _has_bias(kind: ComponentKind, adapter: Adapter, end: int | None) -> int:
    layer = adapter.layer(kind.resolve(adapter))
    own = {"heads": layer.attention.has_bias, "neurons": layer.has_mlp_bias}.get(kind.kind, False)
    if kind.kind == "modules":
        own = layer.attention.has_bias or layer.has_mlp_bias
    return int(own or meets_bias(kind, adapter, end))


@dataclass(frozen=True)
class _Job:
    """The parts of the peak. All in bytes."""

    positions: int
    longest: int
    counts: list[int]
    rows: int
    width: int
    state: torch.dtype
    compute: torch.dtype
    model: torch.dtype
    budget: int
    passed: list[_Size]
    layers: list[_Size]

    def capturing(self) -> int:
        """What the forward pass holds beside the trace: in its MLP, or in its attention."""
        mlp = max((2 if size.has_up else 1) * size.neurons for size in self.layers)
        attention = max(3 * size.o + 2 * size.v for size in self.layers)
        return self.positions * (self.width + max(mlp, attention)) * self.model.itemsize

    def copies(self) -> float:
        """States held at once: what several MLPs read and, twice, what is sent to one of them."""
        sent = max((share for size in self.passed for _, share in size.mlps if share < 1), default=0.0)
        return 1 + any(size.copied for size in self.passed) + 2 * sent

    def weight_copies(self) -> int:
        """Weights with a norm folded into them, and what has to change its dtype."""
        folded = max((size.v + size.neurons for size in self.passed), default=0)
        cast = self.compute != self.model
        changed = max((max(size.o, size.neurons) * (cast or size.output_norms) for size in self.passed), default=0)
        return self.width * (folded + changed) * self.compute.itemsize

    def activations(self) -> int:
        """What a layer's step makes of the trace, per position."""
        cast = max((size.neurons for size in self.passed), default=0) * (self.compute != self.model)
        return self.positions * (cast * self.compute.itemsize + 3 * self.width * 4)

    def workspace(self) -> int:
        """Of the torch backend: buffers for blocks of attention and chunks of the MLP, and tiles of P."""
        if not self.passed:
            return 0
        item = self.compute.itemsize
        attention = max(self.width + 2 * (size.o + size.v) for size in self.passed)
        mlp = max(self.width + min(size.neurons, 2048) for size in self.passed)
        rows = min(self.rows, self.budget // (2 * min(attention, mlp) * item) + self.longest)
        tiles = 3 * min(self.budget // 4, 4 * self.longest**2 * max(size.o for size in self.passed) // 64)
        return min(self.budget, rows * max(attention, mlp) * item) + tiles

    def dense_workspace(self) -> int:
        """Of the reference backend: dense blocks of one prompt, several at a time."""
        if not self.passed:
            return 0
        attention = max(4 * self.width + 3 * size.o for size in self.passed)
        mlp = max(3 * self.width + 6 * size.neurons for size in self.passed)
        return self.longest * max(self.counts) * max(attention, mlp) * self.state.itemsize

    def gates_again(self) -> float:
        """FLOP that streaming adds: the gates are computed in both passes."""
        return sum(size.gates(self.width, self.rows) for size in self.passed)


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
