"""`verify=True`: what a backend makes of a state, held against the reference operations at a sample of positions.

A backend is watched from outside. Before every step, the reference is given the same state at a few positions; after
it, what the backend has made of it is compared. Nothing is changed: results are those of a run that is not watched.
The reference computes in float64, a position at a time, and what it holds is bounded: attention is recomputed for a
few components, which do not meet there, the MLP for all of them, a block of neurons at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..adapters import Attention, Layer, Mlp, Norm
from ..allocation import Allocation
from ..backends import Backend, ReferenceBackend
from ..backends.base import Made
from ..results.verification import Verification
from ..runtime.memory import available
from ..runtime.transfer import to_device
from ..state.layout import Components, Layout
from ..state.state import ComponentState
from ..trace.record import AttentionTrace, LayerTrace, MlpTrace, Trace

READ, OTHERS = 4, 3  # positions per step, at most: of those that are read in the end, and of all others
COMPONENTS = 8  # whose attention is recomputed at a position, beside `rest` and `bias`
REFERENCE_BYTES = 512 << 20  # that the reference works in, and that its results wait in to be compared
ROUNDINGS = 32  # eps of the sums in a product that adds to a state, which may begin with what is there


class Verifier:
    """Watches the steps of one run; :meth:`begin` again for another. What is drawn, is so by a fixed seed."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, trace: Trace | None = None, reads: Sequence[Sequence[int]] | None = None) -> None:
        """Nothing is compared yet. ``reads`` are the local positions of every prompt that are read in the end."""
        self.steps, self.readout = Verification(), Verification()
        self.random = np.random.default_rng(0)
        self.reads, self.n_prompts = np.zeros(0, np.int64), 1 if trace is None else trace.n_prompts
        if reads is not None:
            self.reads = np.concatenate([trace.offsets[p] + np.array(r, np.int64) for p, r in enumerate(reads)])

    def around(self, backend: Backend) -> Backend:
        """A backend that does the same as ``backend``, and is watched."""
        return _Watched(backend, self)

    def found(self) -> Verification:
        """Of all steps so far, and of the last readout."""
        return self.steps.meet(self.readout)

    def sample(self, layout: Layout, row_bytes: int) -> np.ndarray:
        """Segments to compare, first those that are read: so few that what is held of them, per row, is bounded."""
        read = np.isin(layout.packed, self.reads)
        drawn = [
            self.random.permutation(np.flatnonzero(among))[:most] for among, most in ((read, READ), (~read, OTHERS))
        ]
        return np.concatenate(drawn)[: max(1, REFERENCE_BYTES // (int(layout.counts.max(initial=1)) * row_bytes))]

    def components(self, layout: Layout, segment: int) -> np.ndarray:
        """Some of those alive at a segment, `rest` and `bias` always."""
        extras = len(layout.components[layout.prompt[segment]].extras)
        named = np.arange(extras, layout.counts[segment])
        return np.concatenate([np.arange(extras), np.sort(self.random.permutation(named)[:COMPONENTS])])


@dataclass
class _Expected:
    """What the reference makes of some rows (r,) of the state to come, and what they were before a step (r, D)."""

    segment: int
    rows: np.ndarray
    values: Tensor
    before: Tensor | None = None


class _Watched(Backend):
    """A backend that does what another one does, and compares its results with the reference's."""

    def __init__(self, backend: Backend, verifier: Verifier) -> None:
        self.backend, self.verifier = backend, verifier
        self.name, self.jagged, self.streams = backend.name, backend.jagged, backend.streams
        self.streamable, self.compute_dtype = backend.streamable, backend.compute_dtype

    def expect(self, layer: Layer, trace: LayerTrace, allocation: Allocation) -> None:
        self.backend.expect(layer, trace, allocation)

    def prepare(self, device: torch.device, make: Callable[[], Made]) -> Made:
        return self.backend.prepare(device, make)

    def workspace_bytes(self, device: torch.device) -> int | None:
        return self.backend.workspace_bytes(device)

    def aggregate_ov(
        self, state: ComponentState, weights: Attention, trace: AttentionTrace, queries: Layout | None = None
    ) -> ComponentState:
        target, expected = queries or state.layout, []
        for s in self.verifier.sample(target, row_bytes=1):  # of a few rows only
            chosen = self.verifier.components(target, s)
            prompt, position = int(target.prompt[s]), int(target.local[s])
            values = reference_attention(state, weights, trace, prompt, position, chosen)
            here = int(np.flatnonzero(state.layout.prompt == prompt)[position])
            before = _rows(state, state.layout.starts[here] + chosen)
            expected.append(_Expected(s, target.starts[s] + chosen, values, before))
        out = self.backend.aggregate_ov(state, weights, trace, queries)
        found = self._compared(out.rows, target, expected, f"the attention of layer {state.layer}")
        self.verifier.steps = self.verifier.steps.meet(found)
        return out

    def allocate_mlp(
        self,
        state: ComponentState,
        weights: Mlp,
        trace: MlpTrace,
        allocation: Allocation,
        source: ComponentState | None = None,
    ) -> ComponentState:
        layout, expected = state.layout, []
        size = state.rows.element_size()
        for s in self.verifier.sample(layout, state.rows.shape[1] * (max(4, size) + size)):
            values = reference_mlp(state, source or state, weights, trace, allocation, s)
            rows = np.arange(layout.starts[s], layout.starts[s + 1])
            expected.append(_Expected(s, rows, values, _rows(state, rows)))
        out = self.backend.allocate_mlp(state, weights, trace, allocation, source)
        what = f"expert {weights.name}" if weights.name else "the MLP"
        jumps = allocation.rule not in ("softmax", "taylor")
        found = self._compared(out.rows, layout, expected, f"{what} of layer {state.layer}", jumps)
        self.verifier.steps = self.verifier.steps.meet(found)
        return out

    def read_out(self, state: ComponentState, norm: Norm | None, resid: Tensor, directions: Tensor) -> Tensor:
        layout, expected = state.layout, []
        for s in self.verifier.sample(layout, 8 * len(directions)):
            values = reference_readout(state, norm, resid, directions, s)
            expected.append(_Expected(s, np.arange(layout.starts[s], layout.starts[s + 1]), values))
        out = self.backend.read_out(state, norm, resid, directions)
        self.verifier.readout = self._compared(out, layout, expected, "the readout")
        return out

    def _compared(
        self, out: Tensor, layout: Layout, expected: list[_Expected], what: str, jumps: bool = False
    ) -> Verification:
        """The outcome for some rows of ``out``; ``jumps`` says that they may be anything near a tie."""
        found, prompts = Verification(), self.verifier.n_prompts
        for one in expected:
            rows = out[to_device(one.rows, out.device)].to(one.values)
            of = "" if prompts == 1 else f" of prompt {layout.prompt[one.segment] % prompts}"
            where = f"{what}, position {layout.local[one.segment]}{of}"
            products = self.compute_dtype or out.dtype
            eps = max(map(_eps, (out.dtype, products, one.values.dtype)))
            limit = 2.0 if jumps and eps > _eps(torch.float32) else eps**0.5
            difference = (rows - one.values).abs()
            found = found.meet(Verification(_relative(difference, rows, one.values), where, 1, limit))
            if one.before is not None:
                before = one.before.to(rows)
                sums = max(_eps(torch.promote_types(out.dtype, torch.float32)), _eps(one.values.dtype))
                rounding = (_eps(out.dtype) + ROUNDINGS * sums) * torch.maximum(before.abs(), one.values.abs())
                unexplained = torch.relu(difference - rounding)
                added = _relative(unexplained, rows - before, one.values - before)
                found = found.meet(Verification(added=added, added_where=where, added_limit=limit))
        return found


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _relative(difference: Tensor, one: Tensor, other: Tensor) -> float:
    """‖difference‖ relative to the larger of two; inf where it is no number."""
    error, scale = float(difference.norm()), max(float(one.norm()), float(other.norm()))
    relative = error / scale if scale else error
    return relative if relative == relative else torch.inf


# -- the reference, on parts of a state -------------------------------------------------------------------------------


def reference_attention(
    state: ComponentState, weights: Attention, trace: AttentionTrace, prompt: int, position: int, chosen: np.ndarray
) -> Tensor:
    """The components ``chosen`` (C,) at a position of a prompt after the attention: (C, D), nothing left out."""
    segments = np.flatnonzero(state.layout.prompt == prompt)[: position + 1]  # what comes later is not seen
    heads = (2 * weights.n_heads + weights.n_kv_heads) * weights.head_dim
    each = len(segments) * (4 * state.rows.shape[1] + heads)  # numbers that are held per component
    dtype = _dtype(weights.w_v.device, each)
    size = max(1, REFERENCE_BYTES // (each * dtype.itemsize))
    parts = []
    for first in range(0, len(chosen), size):
        part = _part(state, segments, chosen[first : first + size], weights.w_v.device, dtype)
        here = Layout.of(part.layout.components, part.layout.packed[:1], [np.array([position])])
        parts.append(ReferenceBackend().aggregate_ov(part, weights, trace, here).rows)
    return torch.cat(parts)


def reference_mlp(
    state: ComponentState,
    source: ComponentState,
    weights: Mlp,
    trace: MlpTrace,
    allocation: Allocation,
    segment: int,
) -> Tensor:
    """All components at a segment after the MLP, which reads ``source``: (count, D), in float32 at least."""
    device, at = weights.w_gate.device, np.array([segment])
    every = np.arange(len(state.layout.components[state.layout.prompt[segment]]))
    width, neurons = state.rows.shape[1], weights.w_gate.shape[0]
    each = 8 * len(every) + 3 * width  # numbers that are held per neuron
    dtype = _dtype(device, 8 * len(every) * width + 16 * each)
    size = max(16, REFERENCE_BYTES // (each * dtype.itemsize))
    reads, out = (_part(one, at, every, device, dtype) for one in (source, state))
    for first in range(0, neurons, size):  # no neuron's allocation depends on another neuron
        part, constants = slice(first, first + size), first == 0
        some = replace(trace, gate=trace.gate[:, part], act=trace.act[:, part])
        out = ReferenceBackend().allocate_mlp(out, _some_neurons(weights, part, constants), some, allocation, reads)
    narrow = dtype == torch.float32 or state.rows.dtype != torch.float64
    return out.rows.to(torch.float32 if narrow else torch.float64)  # they wait, while the backend works


def reference_readout(
    state: ComponentState, norm: Norm | None, resid: Tensor, directions: Tensor, segment: int
) -> Tensor:
    """The readout of all components at a segment: (count, K)."""
    count, width = int(state.layout.counts[segment]), state.rows.shape[1]
    dtype = _dtype(state.device, 4 * width)
    size, parts = max(1, REFERENCE_BYTES // (4 * width * dtype.itemsize)), []
    for first in range(0, count, size):
        chosen = np.arange(first, min(first + size, count))
        part = _part(state, np.array([segment]), chosen, state.device, dtype)
        parts.append(ReferenceBackend().read_out(part, norm, resid, directions))
    return torch.cat(parts)


def _part(
    state: ComponentState, segments: np.ndarray, chosen: np.ndarray, device: torch.device, dtype: torch.dtype
) -> ComponentState:
    """A copy of some components (C,) at some segments (S',) of one prompt, as a state of that prompt alone."""
    layout = state.layout
    whole = layout.components[layout.prompt[segments[0]]]
    extras = tuple(whole.extras[m] for m in chosen if m < len(whole.extras))
    components = Components(extras, (), whole.births[chosen], whole.excluded[chosen])
    local, origin = layout.local[segments], layout.packed[segments[:1]] - layout.local[segments[:1]]
    rows = (layout.starts[segments][:, None] + chosen)[chosen < layout.counts[segments][:, None]]
    values = _rows(state, rows).to(device, dtype)
    return ComponentState(values, Layout.of((components,), origin, [local]), state.layer, state.site)


def _rows(state: ComponentState, rows: np.ndarray) -> Tensor:
    """A copy of some rows of a state."""
    return state.rows[to_device(rows, state.device)]


@dataclass(frozen=True)
class _Projection:
    """Some rows or columns of a linear map, as an MLP holds one."""

    weight: Tensor
    bias: Tensor | None


def _some_neurons(weights: Mlp, part: slice, constants: bool) -> Mlp:
    """An MLP of some of the neurons; with the constants that it writes, or without."""
    bias, output = weights.gate.bias, weights.output
    gate = _Projection(weights.w_gate[part], None if bias is None else bias[part])
    down = _Projection(weights.w_down[:, part], weights.down.bias if constants else None)
    if output is not None and not constants:
        output = replace(output, bias=None)
    return replace(weights, gate=gate, down=down, output=output)


def _dtype(device: torch.device, numbers: int) -> torch.dtype:
    """float64; float32 where the device has no such, or no room for so many numbers."""
    free = available(device)
    fits = free is None or torch.float64.itemsize * numbers + REFERENCE_BYTES <= free
    return torch.float64 if device.type != "mps" and fits else torch.float32
