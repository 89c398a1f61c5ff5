"""What an adjoint sweep of a call will take, whichever workspace it gets: from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..adapters import Adapter
from ..adjoint.cost import StartSize, SweepWorkload
from ..adjoint.memory import SweepMemory, default_workspace
from ..allocation import Allocation
from ..backends import has_compute_dtype
from ..components.base import ComponentKind
from ..components.features import Features
from ..components.given import Custom
from ..options import Adjoint, Options
from .shapes import ForwardPass, has_bias, layer_sizes, named_components, reach


@dataclass(frozen=True)
class SweepOutlook:
    """One job per prompt, one after the other, and the forward pass before them."""

    jobs: list[SweepWorkload]
    forward: ForwardPass
    given: int | None  # bytes of workspace that were asked for
    layer: int
    n_components: int
    upper_bound: bool
    wide: torch.dtype
    compute: torch.dtype

    def default_workspace(self, free: int | None) -> int:
        """What the sweep will begin with, where so much is free before the forward pass."""
        left = None if free is None else max(0, free - self.forward.held)
        return self.given or max(1, default_workspace([left], self.jobs[0].room.cuda))

    def smallest(self, workspace: int) -> int:
        """What halving a workspace again and again comes to, as the sweep does where memory runs out."""
        while workspace // 2 >= self.jobs[0].room.least:
            workspace //= 2
        return workspace

    def peak(self, workspace: int, loud: int | None) -> int:
        """Bytes beyond the loaded model, with ``loud`` components per start layer; None: as many as are carried."""
        need = max(self._with(job, loud).peak(workspace) for job in self.jobs)
        return max(self.forward.peak, self.forward.held + need)

    def flop(self, workspace: int, loud: int | None) -> float:
        """Of the sweep alone."""
        known: dict[tuple, float] = {}
        for job in self.jobs:
            if (key := _key(job)) not in known:
                known[key] = self._with(job, loud).flop(workspace)
        return sum(known[_key(job)] for job in self.jobs)

    def rows(self, loud: int | None) -> int:
        """Rows that are carried explicitly, at all positions, of all start layers of the largest prompt."""
        return max(self._with(job, loud).rows() * job.room.n for job in self.jobs)

    @property
    def layers_passed(self) -> int:
        return sum(max(0, self.jobs[0].end - start.entering) for start in self.jobs[0].starts)

    @staticmethod
    def _with(job: SweepWorkload, loud: int | None) -> SweepWorkload:
        return job if loud is None else replace(job, loud=loud)


def _key(job: SweepWorkload) -> tuple:
    return job.room.n, tuple(start.named for start in job.starts)


def foresee(
    adapter: Adapter,
    lengths: Sequence[int],
    kind: ComponentKind,
    options: Options,
    method: Adjoint,
    *,
    end: int | None,
    device: torch.device,
    traced: bool,
    counts: Sequence[int] | None = None,
) -> SweepOutlook:
    """The outlook of a call; arguments as of :func:`depass_fast.planner.plan`."""
    state, compute = options.dtypes(adapter.dtype, device)
    wide = torch.promote_types(state, torch.float32)
    compute = compute if has_compute_dtype(options.backend) else wide
    kinds = kind.each(adapter)
    last = reach(kinds[-1], adapter, end)[1]
    layers, softmax = layer_sizes(adapter), Allocation(options.allocation).is_softmax
    casts = wide != adapter.dtype
    jobs, exact = [], True
    for p, n in enumerate(lengths):
        starts = []
        for one in kinds:
            named, known = named_components(one, adapter, n)
            exact &= known or counts is not None
            named = named if counts is None else counts[p]
            entering, extras = reach(one, adapter, end)[0], 1 + has_bias(one, adapter, end)
            held, making = _start_bytes(one, adapter, n, named, wide.itemsize, casts)
            starts.append(StartSize(entering, named, extras, held, making))
        starts.sort(key=lambda start: start.entering)
        widest = max(size.reached(n) for size in layers)
        jobs.append(
            SweepWorkload(
                room=SweepMemory(n, adapter.hidden_size, widest, wide.itemsize, len(starts), device.type == "cuda"),
                layers=layers,
                starts=starts,
                end=last,
                method=method,
                softmax=softmax,
                loud=1 << 30,
                item=wide.itemsize,
                compute=compute.itemsize,
                heads=adapter.layer(0).attention.n_heads,
                copies=compute != adapter.dtype or any(s.output_norms or len(s.mlps) > 1 for s in layers),
                records=casts,
            )
        )
    return SweepOutlook(
        jobs=jobs,
        forward=ForwardPass.of(adapter, lengths, traced),
        given=options.memory_budget,
        layer=kinds[0].resolve(adapter),
        n_components=max(start.named + start.extras for job in jobs for start in job.starts),
        upper_bound=not exact,
        wide=wide,
        compute=compute,
    )


def _start_bytes(kind: ComponentKind, adapter: Adapter, n: int, named: int, item: int, casts: bool) -> tuple[int, int]:
    """What a start's components are made of, beyond the trace and the model, and what its making holds for a while."""
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
