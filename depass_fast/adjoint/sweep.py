"""One prompt's sweep from the trace to scores: mean field, adjoint, refinement, estimate (docs/adjoint.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..options import Adjoint
from ..results.estimate import Estimate
from ..runtime.budget import Budget
from ..runtime.memory import available
from ..runtime.precision import full_precision
from ..runtime.progress import Parts
from .approximation import Approximation
from .backward import extra_scores, linear_scores
from .estimate import Sample, draw, draw_by_size, judge, layer_error, relative_change, worst
from .forward import Forward, mean_field
from .loud import Loud, find_loud, loud_until
from .memory import SweepMemory, default_workspace, gates_budget
from .refine import scores_given_z
from .rows import BIAS_ROW, REST_ROW
from .stack import LayerStack
from .starts import Start

_ADVICE = "the trace and one start layer do not fit. Take a shorter prompt, or fewer targets at once."


@dataclass
class Scores:
    """The scores of a sweep, on the CPU: ``named`` (K, M) per start; ``rest`` and ``bias`` (starts, K).

    The readout's constants are not part of ``bias``.
    """

    named: list[Tensor]
    rest: Tensor
    bias: Tensor
    estimate: Estimate | None


@dataclass
class Sweep:
    """One prompt's sweep: ``starts`` in order, read in ``directions`` (K, D) at the end of the stack.

    ``budget``: bytes of workspace. Four fifths of it are for the tables of the steps and the rows of start layers that
    are carried together, the rest for gates. It changes no score, beyond rounding.
    """

    stack: LayerStack
    starts: list[Start]
    directions: Tensor
    approximation: Approximation
    budget: int | None

    @full_precision()
    def run(self, method: Adjoint) -> Scores:
        """Screen all components; refine the largest; estimate.

        A sweep changes nothing: one that runs out of memory is begun again with half the workspace.
        """
        given = self.budget or self._default()  # not asked again when memory has run out, and nothing is free
        workspace = Budget(given, lambda _: given, self._release, self._memory.least, _ADVICE)
        return workspace.prepare(self._device, lambda: self._attempt(method, workspace.bytes(self._device)))

    def _attempt(self, method: Adjoint, workspace: int) -> Scores:
        self._workspace = workspace
        groups = self._groups()
        loud = self._loud()
        refines, samples = method.refine > 0, method.sample > 0
        self.stack.progress = Parts(self._walks(groups, method) * sum(self._length(group) for group in groups))
        found = _RoundTrip(self, groups, loud, keep=samples and not refines)
        screened, refined = found.flat, torch.zeros(0, dtype=torch.long, device="cpu")
        if refines:
            refined = self._largest(screened, method)
            explicit = self._explicit(loud, self.split(refined))
            found = _RoundTrip(self, groups, explicit, keep=samples)
        estimate = self._estimate(found, screened, refined, method) if refines or samples else None
        return Scores(list(found.flat.split(self._sizes, dim=1)), found.rest, found.bias, estimate)

    def _length(self, group: slice) -> int:
        """Return the layers that a way there or back with these start layers passes."""
        return max(0, self.stack.end - self.starts[group][0].entering)

    def _walks(self, groups: list[slice], method: Adjoint) -> int:
        """Return how often :meth:`run` passes the layers, there or back."""
        sampled = (2 if len(groups) == 1 else 4) if method.sample else 0  # there once more where nothing is kept
        return (4 if method.refine else 2) + sampled

    @property
    def _sizes(self) -> list[int]:
        return [len(start.named) for start in self.starts]

    def split(self, index: Tensor) -> list[Tensor]:
        """Return sorted positions in the flat list of all components as indices of every start's components."""
        edges = torch.tensor([0, *self._sizes], device="cpu").cumsum(0)
        bounds = torch.searchsorted(index, edges).tolist()
        return [index[a:b] - edge for a, b, edge in zip(bounds[:-1], bounds[1:], edges.tolist(), strict=False)]

    def _loud(self) -> list[Loud]:
        """Return every start's loud components."""
        return find_loud(self.stack, self.starts, self.approximation, self._most_loud, self.gates_budget)

    def _explicit(self, loud: list[Loud], refined: list[Tensor]) -> list[Loud]:
        """Return every start's loud components and those to be refined."""
        others = [members[~torch.isin(members, one.index)] for members, one in zip(refined, loud, strict=True)]
        more = loud_until(self.stack, self.starts, others, self.approximation, self.gates_budget)
        return [one.joined(other) for one, other in zip(loud, more, strict=True)]

    def _groups(self) -> list[slice]:
        """Return the start layers that are carried together: as many as their tables allow.

        Those that enter behind a layer's attention go alone, as the others pass it.
        """
        if any(start.mid for start in self.starts):
            return [slice(s, s + 1) for s in range(len(self.starts))]
        lengths = [self.stack.end - start.entering for start in self.starts]
        return self._memory.groups(lengths, max(self._sizes), self.approximation.at_most, self._workspace)

    @property
    def _device(self) -> torch.device:
        return self.starts[0].bias.device

    def _default(self) -> int:
        free = [available(device) for device in {start.bias.device for start in self.starts}]
        return default_workspace(free, self._device.type == "cuda")

    def _release(self) -> None:
        self.stack.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @cached_property
    def _memory(self) -> SweepMemory:
        widest = max((sum(part.act.shape[1] for part in record.mlps) for record in self.stack.trace.layers), default=1)
        width, item, is_cuda = self.directions.shape[1], self.directions.element_size(), self._device.type == "cuda"
        return SweepMemory(self.stack.n, width, widest, item, len(self.starts), is_cuda)

    @property
    def _most_loud(self) -> int:
        return self._memory.most_loud(self.approximation.at_most)

    @property
    def gates_budget(self) -> int:
        """Bytes of the gates that are held at once."""
        return gates_budget(self._workspace)

    def _largest(self, flat: Tensor, method: Adjoint) -> Tensor:
        """Return the components to be refined, sorted: the largest of any target that do not start at the end."""
        parts = flat.abs().split(self._sizes, dim=1) if method.within == "layer" else [flat.abs()]
        chosen, first = [], 0
        for part in parts:
            chosen.append(part.topk(min(method.refine, part.shape[1]), dim=1).indices.flatten() + first)
            first += part.shape[1]
        index = torch.cat(chosen).unique()
        late = torch.cat([torch.full((len(s.named),), s.entering >= self.stack.end, device="cpu") for s in self.starts])
        return index[~late[index]]

    def _estimate(self, found: _RoundTrip, screened: Tensor, refined: Tensor, method: Adjoint) -> Estimate:
        """Return what refinement and a sample say; the worst target's figures."""
        flat = found.flat
        top = min(method.refine or -(-flat.shape[1] // 100), flat.shape[1])
        sample = self._sampled(found, top, method)
        if not len(refined):
            return worst(sample, top)
        moved = relative_change(flat[:, refined], screened[:, refined])
        parts = zip(self.starts, flat.split(self._sizes, dim=1), screened.split(self._sizes, dim=1), strict=True)
        return worst(sample, top, moved, {start.layer: relative_change(now, before) for start, now, before in parts})

    def _sampled(self, found: _RoundTrip, top: int, method: Adjoint) -> Sample:
        """Return what components drawn at random say, given log Z."""
        flat, left = found.flat, (~found.settled).nonzero()[:, 0]
        if not (method.sample and len(left)):
            return Sample()
        generator = torch.Generator().manual_seed(method.seed)
        drawn = [draw(scores[left].abs(), left, top, method.sample, generator) for scores in flat]
        uniform = torch.cat([one.uniform for one in drawn]).unique()
        parts = list(zip(flat.split(self._sizes, dim=1), found.settled.split(self._sizes), strict=True))
        checked = [
            draw_by_size(scores, ~settled, len(self.starts), method.sample, explicit, generator)
            for (scores, settled), explicit in zip(parts, found.explicit, strict=True)
        ]
        edges = torch.tensor([0, *self._sizes], device="cpu").cumsum(0).tolist()
        by_layer = [members + edge for members, edge in zip(checked, edges, strict=False)]
        others = torch.cat([*(one.near for one in drawn), *by_layer]).unique()
        others = others[~torch.isin(others, uniform)]
        exact = torch.full_like(flat, float("nan"))
        exact[:, uniform], partition_error = found.given_z(uniform, measure=True)
        exact[:, others], _ = found.given_z(others)
        layers = {
            start.layer: layer_error(scores, truth, ~settled)
            for start, (scores, settled), truth in zip(self.starts, parts, exact.split(self._sizes, dim=1), strict=True)
        }
        figures = [judge(final, truth, one, top) for final, truth, one in zip(flat, exact, drawn, strict=True)]
        return Sample(figures, len(uniform) + len(others), partition_error, layers)


class _RoundTrip:
    """One way there and back: scores ``flat`` (K, all) on the CPU, ``rest`` and ``bias`` (starts, K).

    ``explicit`` components of every start are carried until they are quiet. ``settled`` (all,) says which these are,
    and which start at the end: little but log Z stands between their scores and exact ones.
    """

    def __init__(self, sweep: Sweep, groups: list[slice], explicit: list[Loud], keep: bool) -> None:
        self.sweep, self.groups, self.explicit = sweep, groups, explicit
        named, rest, bias, settled = [], [], [], []
        self._kept: Forward | None = None
        for group in groups:
            forward = self._forward(group)
            named += linear_scores(sweep.stack, forward, sweep.directions, sweep.approximation)
            rest.append(extra_scores(forward, sweep.directions, REST_ROW).cpu())
            bias.append(extra_scores(forward, sweep.directions, BIAS_ROW).cpu())
            settled.append(_settled(forward, sweep.stack.end, explicit[group]))
            self._kept = forward if keep and len(groups) == 1 else None
        self.flat = torch.cat(named, dim=1).cpu()
        self.rest, self.bias, self.settled = torch.cat(rest), torch.cat(bias), torch.cat(settled)

    def _forward(self, group: slice) -> Forward:
        sweep = self.sweep
        starts, explicit = sweep.starts[group], self.explicit[group]
        return mean_field(sweep.stack, starts, explicit, sweep.approximation, sweep.gates_budget)

    def given_z(self, index: Tensor, measure: bool = False) -> tuple[Tensor, float | None]:
        """Return scores (K, k) of components ``index`` (k,), sorted, by themselves given log Z.

        The second is the largest relative error of Z that they show; ``measure`` as of :func:`scores_given_z`.
        """
        sweep, chosen = self.sweep, self.sweep.split(index)
        found, errors = [], []
        for group in self.groups:
            if not sum(map(len, chosen[group])):
                continue
            forward = self._kept or self._forward(group)
            given = scores_given_z(
                sweep.stack,
                forward.starts,
                forward.steps,
                chosen[group],
                sweep.directions,
                sweep.approximation,
                sweep.gates_budget,
                forward.released,
                measure,
            )
            found.append(given.scores.T.cpu())
            if given.partition_error is not None:
                errors.append(given.partition_error)
        scores = torch.cat(found, dim=1) if found else self.flat.new_zeros(len(self.flat), 0)
        return scores.to(self.flat), max(errors, default=None)


def _settled(forward: Forward, end: int, explicit: Sequence[Loud]) -> Tensor:
    """Return which components are explicit until they are quiet, or start at the end: (all,) bool."""
    parts = []
    for start, chosen in zip(forward.starts, explicit, strict=True):
        done = torch.full((len(start.named),), start.entering >= end, device="cpu")
        done[chosen.index] = True
        parts.append(done)
    return torch.cat(parts)
