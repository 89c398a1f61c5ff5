"""`verify=True`: the steps of a backend, compared with the reference operations at a sample of positions.

A backend is watched from outside. Before every step, the reference computes the step at a few positions of the same
state (:mod:`.reference_parts`); after it, the backend's rows are compared with these. The state is not touched: results
are those of a run that is not watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter, Attention, Layer, Mlp, Norm
from ..allocation import Allocation
from ..backends import Backend
from ..backends.base import Made
from ..results.verification import Verification
from ..runtime.transfer import to_device
from ..state.layout import Layout
from ..state.state import ComponentState
from ..trace.record import AttentionTrace, LayerTrace, MlpTrace, Trace
from . import reference_parts
from .reference_parts import copy_rows, reference_attention, reference_mlp, reference_readout

READ, OTHERS = 4, 3  # positions per step, at most: of those that are read in the end, and of all others
COMPONENTS = 8  # components per position whose attention is recomputed, beside `rest` and `bias`
ROUNDINGS = 32  # eps of the sums inside a product that adds to a state: the sum may begin with the state's number


class Verifier:
    """Watches the steps of one run; :meth:`begin` starts another. Samples are drawn with a fixed seed."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, trace: Trace | None = None, reads: Sequence[Sequence[int]] | None = None) -> None:
        """Forget all comparisons. ``reads`` are the local positions of every prompt that are read in the end."""
        self.steps, self.readout = Verification(), Verification()
        self.random = np.random.default_rng(0)
        self.n_prompts = 1 if trace is None else trace.n_prompts
        self.reads = np.zeros(0, np.int64)  # positions in the trace
        if trace is not None and reads is not None:
            self.reads = np.concatenate([trace.offsets[p] + np.array(r, np.int64) for p, r in enumerate(reads)])

    def around(self, backend: Backend) -> Backend:
        """Return a backend that does the same as ``backend`` and is watched."""
        return _Watched(backend, self)

    def found(self) -> Verification:
        """Return the outcome of all steps so far and of the last readout."""
        return self.steps.meet(self.readout)

    def draw_segments(self, layout: Layout, row_bytes: int) -> np.ndarray:
        """Draw segments to compare, those that are read first. ``row_bytes`` per row of theirs must fit into memory."""
        read = np.isin(layout.packed, self.reads)
        of_read = self.random.permutation(np.flatnonzero(read))[:READ]
        of_others = self.random.permutation(np.flatnonzero(~read))[:OTHERS]
        segment_bytes = int(layout.counts.max(initial=1)) * row_bytes
        return np.concatenate([of_read, of_others])[: max(1, reference_parts.REFERENCE_BYTES // segment_bytes)]

    def draw_components(self, layout: Layout, segment: int) -> np.ndarray:
        """Draw some of the components alive at a segment; `rest` and `bias` are always among them."""
        extras = len(layout.components[layout.prompt[segment]].extras)
        named = np.arange(extras, layout.counts[segment])
        return np.concatenate([np.arange(extras), np.sort(self.random.permutation(named)[:COMPONENTS])])


@dataclass
class _Sample:
    """Some rows of one segment: their numbers after a step by the reference, and their numbers before the step."""

    segment: int
    rows: np.ndarray  # (r,) in the state after the step
    expected: Tensor  # (r, D), for a readout (r, K)
    before: Tensor | None = None  # (r, D); None for a readout, which adds to nothing


class _Watched(Backend):
    """A backend that does what another one does, and compares its results with the reference's."""

    def __init__(self, backend: Backend, verifier: Verifier) -> None:
        self.backend, self.verifier = backend, verifier
        self.name, self.jagged, self.streams = backend.name, backend.jagged, backend.streams
        self.streamable, self.compute_dtype = backend.streamable, backend.compute_dtype
        self.joins, self.ranks = backend.joins, backend.ranks

    def begin(self, adapter: Adapter, trace: Trace, first: int, end: int) -> None:
        self.backend.begin(adapter, trace, first, end)

    def expect(self, layer: Layer, trace: LayerTrace, allocation: Allocation) -> None:
        self.backend.expect(layer, trace, allocation)

    def prepare(self, device: torch.device, make: Callable[[], Made]) -> Made:
        return self.backend.prepare(device, make)

    def missed(self, state: ComponentState, resid: Tensor) -> tuple[Tensor, Tensor]:
        return self.backend.missed(state, resid)

    def workspace_bytes(self, device: torch.device) -> int | None:
        return self.backend.workspace_bytes(device)

    def aggregate_ov(
        self,
        state: ComponentState,
        weights: Attention,
        trace: AttentionTrace,
        queries: Layout | None = None,
        source: ComponentState | None = None,
    ) -> ComponentState:
        target, samples = queries or state.layout, []
        for s in self.verifier.draw_segments(target, row_bytes=1):  # few components: their rows take no memory
            chosen = self.verifier.draw_components(target, s)
            prompt, position = int(target.prompt[s]), int(target.local[s])
            expected = reference_attention(state, weights, trace, prompt, position, chosen, source)
            here = int(np.flatnonzero(state.layout.prompt == prompt)[position])
            before = copy_rows(state, state.layout.starts[here] + chosen)
            samples.append(_Sample(s, target.starts[s] + chosen, expected, before))
        out = self.backend.aggregate_ov(state, weights, trace, queries, source)
        found = self._compared(out.rows, target, samples, f"the attention of layer {state.layer}")
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
        layout, samples = state.layout, []
        size = state.rows.element_size()
        for s in self.verifier.draw_segments(layout, state.rows.shape[1] * (max(4, size) + size)):
            expected = reference_mlp(state, source or state, weights, trace, allocation, s)
            rows = layout.rows_of(np.array([s]))
            samples.append(_Sample(s, rows, expected, copy_rows(state, rows)))
        out = self.backend.allocate_mlp(state, weights, trace, allocation, source)
        what = f"expert {weights.name}" if weights.name else "the MLP"
        what = "the gate of the token's embedding" if weights.follows else what
        jumps = allocation.rule != "softmax" and allocation.linear_rule is None
        found = self._compared(out.rows, layout, samples, f"{what} of layer {state.layer}", jumps)
        self.verifier.steps = self.verifier.steps.meet(found)
        return out

    def read_out(self, state: ComponentState, norm: Norm | None, resid: Tensor, directions: Tensor) -> Tensor:
        layout, samples = state.layout, []
        for s in self.verifier.draw_segments(layout, 8 * len(directions)):
            expected = reference_readout(state, norm, resid, directions, s)
            samples.append(_Sample(s, layout.rows_of(np.array([s])), expected))
        out = self.backend.read_out(state, norm, resid, directions)
        self.verifier.readout = self._compared(out, layout, samples, "the readout")
        return out

    def _compared(
        self, out: Tensor, layout: Layout, samples: list[_Sample], what: str, jumps: bool = False
    ) -> Verification:
        """Compare the samples with the rows of ``out``. ``jumps``: a rule may decide differently near a tie."""
        found, n_prompts = Verification(), self.verifier.n_prompts
        for sample in samples:
            of_prompt = "" if n_prompts == 1 else f" of prompt {layout.prompt[sample.segment] % n_prompts}"
            where = f"{what}, position {layout.local[sample.segment]}{of_prompt}"
            rows = out[to_device(sample.rows, out.device)].to(sample.expected)
            found = found.meet(self._outcome(rows, out.dtype, sample, where, jumps))
        return found

    def _outcome(self, rows: Tensor, dtype: torch.dtype, sample: _Sample, where: str, jumps: bool) -> Verification:
        """Compare one sample with its ``rows``, which the backend computed in ``dtype``."""
        expected = sample.expected
        eps = max(_eps(dtype), _eps(self.compute_dtype or dtype), _eps(expected.dtype))
        limit = 2.0 if jumps and eps > _eps(torch.float32) else eps**0.5
        difference = (rows - expected).abs()
        found = Verification(_relative(difference, rows, expected), where, 1, limit)
        if sample.before is None:
            return found
        before = sample.before.to(rows)
        sums = max(_eps(torch.promote_types(dtype, torch.float32)), _eps(expected.dtype))
        rounding = (_eps(dtype) + ROUNDINGS * sums) * torch.maximum(before.abs(), expected.abs())
        unexplained = torch.relu(difference - rounding)
        added = _relative(unexplained, rows - before, expected - before)
        return found.meet(Verification(added=added, added_where=where, added_limit=limit))


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _relative(difference: Tensor, one: Tensor, other: Tensor) -> float:
    """Return ‖difference‖ relative to the larger norm of two tensors; inf if it is not a number."""
    error, scale = float(difference.norm()), max(float(one.norm()), float(other.norm()))
    relative = error / scale if scale else error
    return torch.inf if math.isnan(relative) else relative
