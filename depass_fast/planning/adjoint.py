"""The outlook of an adjoint sweep: memory and arithmetic for any workspace, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..adapters import Adapter
from ..adjoint.cost import StartSize, SweepWorkload
from ..adjoint.memory import SweepMemory, default_workspace
from ..allocation import Allocation
from ..backends import has_compute_dtype
from ..components.base import ComponentKind
from ..components.custom import Custom
from ..components.features import Features
from .shapes import ForwardPass, RunShape, has_bias, layer_sizes, named_components, reach


@dataclass(frozen=True)
class SweepOutlook:
    """The forward pass of all prompts, then a sweep per position that is read, one after the other.

    ``given`` are the bytes of workspace that were asked for, None if nobody asked.
    """

    workloads: list[SweepWorkload]
    forward: ForwardPass
    given: int | None
    layer: int
    n_components: int
    upper_bound: bool
    wide: torch.dtype
    compute: torch.dtype

    def default_workspace(self, free: int | None) -> int:
        """The workspace that the sweep begins with, if ``free`` bytes are free before the forward pass."""
        left = None if free is None else max(0, free - self.forward.held)
        return self.given or max(1, default_workspace([left], self.workloads[0].memory.cuda))

    def smallest(self, workspace: int) -> int:
        """The workspace that is left when it is halved again and again, as the sweep does where memory runs out."""
        while workspace // 2 >= self.workloads[0].memory.least:
            workspace //= 2
        return workspace

    def fitting_workspace(self, free: int, loud: int | None) -> int | None:
        """The default workspace, halved until ``free`` bytes hold the peak; None if the smallest is too large."""
        workspace = self.default_workspace(free)
        smallest = self.smallest(workspace)
        while workspace > smallest and self.peak(workspace, loud) > free:
            workspace //= 2
        return workspace if self.peak(workspace, loud) <= free else None

    def least(self, free: int) -> int:
        """The peak with the smallest workspace and no loud components."""
        return self.peak(self.smallest(self.default_workspace(free)), 0)

    def peak(self, workspace: int, loud: int | None) -> int:
        """Bytes beyond the loaded model, with ``loud`` components per start layer; None: as many as are carried."""
        need = max(_with_loud(work, loud).peak(workspace) for work in self.workloads)
        return max(self.forward.peak, self.forward.held + need)

    def flop(self, workspace: int, loud: int | None) -> float:
        """FLOP of the sweeps alone."""
        known: dict[tuple, float] = {}  # prompts of one size take the same
        for work in self.workloads:
            if (key := _size(work)) not in known:
                known[key] = _with_loud(work, loud).flop(workspace)
        return sum(known[_size(work)] for work in self.workloads)

    def rows(self, loud: int | None) -> int:
        """Rows that are carried explicitly, at all positions, of all start layers of the largest prompt."""
        return max(_with_loud(work, loud).rows() * work.memory.n for work in self.workloads)

    @property
    def layers_passed(self) -> int:
        first = self.workloads[0]
        return sum(max(0, first.end - start.entering) for start in first.starts)


def _with_loud(work: SweepWorkload, loud: int | None) -> SweepWorkload:
    return work if loud is None else replace(work, loud=loud)


def _size(work: SweepWorkload) -> tuple[int, tuple[int, ...]]:
    return work.memory.n, tuple(start.named for start in work.starts)


def sweep_outlook(shape: RunShape, device: torch.device | None = None) -> SweepOutlook:
    """Return the outlook of a sweep by ``shape.method`` on ``device``, by default the model's."""
    adapter, sweeps, kind, options = shape.adapter, shape.sweeps, shape.kind, shape.options
    end, counts, method, device = shape.end, shape.counts, shape.method, device or adapter.device
    assert method is not None, "an exact run is no sweep"
    state, compute = options.dtypes(adapter.dtype, device)
    wide = torch.promote_types(state, torch.float32)
    compute = compute if has_compute_dtype(options.backend) else wide
    kinds, layers = kind.each(adapter), layer_sizes(adapter)
    lengths = {n for _, n in sweeps}
    casts, widest = wide != adapter.dtype, {n: max(size.reached(n) for size in layers) for n in lengths}
    copies = compute != adapter.dtype or any(size.output_norms or len(size.mlps) > 1 for size in layers)
    is_cuda = device.type == "cuda"
    workloads = []
    for prompt, n in sweeps:
        count = None if counts is None else counts[prompt]
        starts = [_start_size(one, adapter, n, count, end, wide.itemsize, casts) for one in kinds]
        starts.sort(key=lambda start: start.entering)
        workloads.append(
            SweepWorkload(
                memory=SweepMemory(n, adapter.hidden_size, widest[n], wide.itemsize, len(starts), is_cuda),
                layers=layers,
                starts=starts,
                end=reach(kinds[-1], adapter, end)[1],
                method=method,
                loud=1 << 30,
                item=wide.itemsize,
                compute=compute.itemsize,
                heads=adapter.layer(0).attention.n_heads,
                copies=copies,
                records=casts,
            )
        )
    return SweepOutlook(
        workloads=workloads,
        forward=ForwardPass.of(adapter, shape.lengths, shape.traced, device),
        given=options.memory_budget,
        layer=kinds[0].resolve(adapter),
        n_components=max(start.named + start.extras for work in workloads for start in work.starts),
        upper_bound=(counts is None or kind.is_layered)
        and not all(named_components(one, adapter, n)[1] for one in kinds for n in lengths),
        wide=wide,
        compute=compute,
    )


def _start_size(
    kind: ComponentKind, adapter: Adapter, n: int, count: int | None, end: int | None, item: int, casts: bool
) -> StartSize:
    """Return the size of one start layer for a prompt of ``n`` tokens, with ``count`` components if that is known."""
    named = named_components(kind, adapter, n)[0] if count is None else count
    entering, extras = reach(kind, adapter, end)[0], 1 + has_bias(kind, adapter, end, Allocation())
    held, making = start_bytes(kind, adapter, n, named, item, casts)
    return StartSize(entering, named, extras, held, making)


def start_bytes(kind: ComponentKind, adapter: Adapter, n: int, named: int, item: int, casts: bool) -> tuple[int, int]:
    """Bytes of what a start's components are made of beyond the trace and the model, and of what their making holds."""
    width, size = adapter.hidden_size, layer_sizes(adapter)[kind.resolve(adapter)]
    held, numbers, vectors = 2 * n * width * item, n * named * item, named * width * item
    if isinstance(kind, Custom):
        return held + n * named * width * item, n * named * width * item
    if isinstance(kind, Features):
        return held + numbers + vectors, max(3 * n * kind.sae.W_dec.shape[0] * item, numbers + vectors)
    own = numbers if casts or size.output_norms else 0
    if len(size.mlps) > 1:  # joined
        own += n * named * adapter.dtype.itemsize + named * width * adapter.dtype.itemsize
    elif size.output_norms:
        own += vectors
    return held + own, numbers + vectors * (1 + casts)
