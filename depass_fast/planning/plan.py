"""The plan of a decomposition: sizes, FLOP and time, as numbers and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..backends import BACKENDS
from ..runtime.brief import brief_repr
from ..runtime.memory import readable


@dataclass(frozen=True)
class BackendEstimate:
    """One backend's requirements: FLOP; bytes of workspace, and at the peak beyond the loaded model; seconds if known.

    ``forward_bytes`` are held while the forward pass is taken: the peak is no smaller, whatever the workspace.
    ``host_bytes`` are no part of the peak, because the state streams from host memory; pinned, where there is room for
    that, it takes up to the next power of two.
    """

    backend: str
    flop: float
    workspace_bytes: int
    peak_bytes: int
    forward_bytes: int
    host_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """The requirements of a decomposition of prompts of ``lengths`` tokens. Sizes are in bytes, times in seconds.

    ``flop`` is the floor of DESIGN.md section 5 for the whole state, at all positions of all layers passed, attention
    included: a row meets (N + 1) / 2 keys. An attribution at one position spares most of the last layer.
    ``upper_bound`` says that every number is a bound: the number of components depends on the prompt (features of a
    dictionary, neurons of experts), or it depends on the memory which states are held together. ``seconds`` rest on
    ``gemm_flops``, FLOP per second of a GEMM, and on the share of it that a backend reaches; None without a rate.

    With ``ranks``, among which the components are dealt, everything but ``n_components`` is the first rank's, which has
    most: rows, state, FLOP and estimates.

    If ``method`` is "adjoint", the rows and the state are those that are carried explicitly, at most; ``flop`` counts
    all products without loud components; one estimate is without loud components, one with as many as are ever carried.
    Under a linear rule the rows are gradients, the state is the gradients and scores that are kept, and there is one
    estimate.

    ``seconds_at_least`` says that the seconds are a lower bound. The model has recurrences: its own code of them, and
    the way through them here, are many small operations, whose time no number of FLOP tells.
    """

    method: str
    components: str
    layer: int  # the first one that components start in
    start_layers: int
    layers_passed: int  # by all of them
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
    estimates: tuple[BackendEstimate, ...]
    available_bytes: int | None
    gemm_flops: float | None
    rate_source: str
    upper_bound: bool
    ranks: int | None = None
    seconds_at_least: bool = False

    __repr__ = brief_repr

    def of(self, backend: str = "torch") -> BackendEstimate:
        """Return the estimate for a backend; of the adjoint, alike with all, the larger one; of ranks theirs.

        Raises:
            KeyError: this plan has no such backend.
        """
        if self.method == "adjoint" and backend in BACKENDS:
            return self.estimates[-1]
        if self.ranks is not None and backend in BACKENDS:
            return self.estimates[0]
        for estimate in self.estimates:
            if estimate.backend == backend:
                return estimate
        raise KeyError(f"no backend {backend!r} in this plan; it has {', '.join(e.backend for e in self.estimates)}")

    def fits(self, memory: int, backend: str = "torch") -> bool:
        """Return True if a device with ``memory`` bytes in all holds the model and the run."""
        return self.weights_bytes + self.of(backend).peak_bytes <= memory

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values under the names that ``depass-fast plan --json`` prints."""
        return {**asdict(self), "lengths": list(self.lengths), "estimates": [asdict(e) for e in self.estimates]}

    def __str__(self) -> str:
        prompts = f"N={self.lengths[0]}" if len(self.lengths) == 1 else f"{len(self.lengths)} prompts, {_range(self)}"
        most = "at most " if self.upper_bound else ""
        rows = [
            ("components", f"{self.components} {_starts(self)}, {prompts}, {most}{self.n_components:,}"),
            (
                "rows",
                f"{most}{self.rows:,} of {self.hidden_size} in {self.state_dtype}, {self.layers_passed} layers passed",
            ),
            ("arithmetic", f"{_flop(self.flop)} at least, in {self.compute_dtype}"),
            ("weights", f"{readable(self.weights_bytes)} ({self.dtype})"),
            ("trace", readable(self.trace_bytes)),
            ("state", readable(self.state_bytes)),
        ]
        if self.ranks is not None:
            rows.append(("ranks", f"{self.ranks}, of which this is the first: no other has more"))
        bound = "at least" if self.seconds_at_least else "about"
        for e in self.estimates:
            host = f", {readable(e.host_bytes)} in host memory" if e.host_bytes else ""
            time = "" if e.seconds is None else f", {bound} {_time(e.seconds)}"
            rows.append((e.backend, f"peak {readable(e.peak_bytes)} beyond the weights{host}{time}"))
        if self.available_bytes is not None:
            rows.append(("available", f"{readable(self.available_bytes)} on {self.device}"))
        if self.gemm_flops is not None:
            rows.append(("time from", f"{_flop(self.gemm_flops)}/s, {self.rate_source}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _starts(plan: Plan) -> str:
    if plan.start_layers == 1:
        return f"from layer {plan.layer}"
    return f"of {plan.start_layers} layers, the first {plan.layer}"


def _range(plan: Plan) -> str:
    return f"N={min(plan.lengths)} to {max(plan.lengths)}"


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
