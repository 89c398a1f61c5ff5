"""One prompt's sweep from the trace to scores: mean field, adjoint, refinement, estimate (DESIGN.md section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import Adapter
from ..trace import Trace
from .backward import extra_scores, linear_scores
from .estimate import Draw, Estimate, draw, judge
from .forward import BIAS_ROW, REST_ROW, Forward, Settings, mean_field
from .method import Method
from .refine import scores_given_z
from .starts import Start, loudness

CPU_BUDGET, GPU_BUDGET = 1 << 30, 16 << 30  # of the tables of the start layers that are carried together


@dataclass
class Scores:
    """Per start: ``named`` (K, M) on the CPU; ``rest`` and ``bias`` (starts, K), without the readout's constants."""

    named: list[Tensor]
    rest: Tensor
    bias: Tensor
    estimate: Estimate | None


@dataclass
class Sweep:
    """What is carried: ``starts`` in order, read in ``directions`` (K, D) at layer ``end`` and position ``n`` - 1."""

    adapter: Adapter
    trace: Trace
    prompt: int
    starts: list[Start]
    directions: Tensor
    end: int
    n: int
    settings: Settings
    budget: int | None

    def run(self, method: Method) -> Scores:
        """Screen all components; then refine and estimate, unless the rule leaves nothing to be refined."""
        groups = self._groups()
        kept: list[Forward] = []
        named, rest, bias, loud, settled = [], [], [], [], []
        for group in groups:
            quick = self._loud(group)
            forward = self._forward(group, quick)
            where = (self.adapter, self.trace, self.prompt)
            named += linear_scores(*where, forward, self.directions, self.end, self.n, self.settings)
            rest.append(extra_scores(forward, self.directions, REST_ROW))
            bias.append(extra_scores(forward, self.directions, BIAS_ROW))
            loud += quick
            settled += [_settled(forward, s, len(start.named)) for s, start in enumerate(forward.starts)]
            if len(groups) == 1 and (method.refine or method.sample):
                kept = [forward]
        flat = torch.cat([scores.cpu() for scores in named], dim=1)  # (K, all)
        estimate = None
        if self.settings.temperature is not None and (method.refine or method.sample):
            estimate = _Second(self, groups, kept, loud, flat, torch.cat(settled)).run(method)
        sizes = [len(start.named) for start in self.starts]
        return Scores(list(flat.split(sizes, dim=1)), torch.cat(rest).cpu(), torch.cat(bias).cpu(), estimate)

    def _forward(self, group: slice, loud: list[Tensor]) -> Forward:
        where = (self.adapter, self.trace, self.prompt)
        return mean_field(*where, self.starts[group], loud, self.end, self.n, self.settings)

    def _loud(self, group: slice) -> list[Tensor]:
        """Indices of every start's loud components."""
        sizes, t = [], self.settings.temperature
        for start in self.starts[group]:
            if t is None or start.entering >= self.end:
                sizes.append(start.bias.new_zeros(len(start.named)))
            else:
                sizes.append(loudness(start, self.adapter, self.trace, self.prompt, t))
        devices = [size.device for size in sizes]
        numbers = torch.stack([(size >= self.settings.loud).sum().to(devices[0]) for size in sizes]).tolist()
        most = self.settings.at_most
        return [size.topk(min(k, most, len(size))).indices for size, k in zip(sizes, numbers, strict=True)]

    def _groups(self) -> list[slice]:
        """Start layers that are carried together: as many as their tables leave room for."""
        on_cpu = self.starts[0].bias.device.type == "cpu"
        budget = self.budget or (CPU_BUDGET if on_cpu else GPU_BUDGET)
        widest = max((sum(part.act.shape[1] for part in record.mlps) for record in self.trace.layers), default=1)
        table = 3 * self.n * widest * self.starts[0].bias.element_size()
        groups, first, used = [], 0, 0
        for s, start in enumerate(self.starts):
            needed = table * max(0, self.end - start.entering)
            if s > first and used + needed > budget:
                groups.append(slice(first, s))
                first, used = s, 0
            used += needed
        return [*groups, slice(first, len(self.starts))]

    def given_z(
        self, groups: Sequence[slice], kept: list[Forward], loud: list[Tensor], index: Tensor, measure: bool = False
    ) -> tuple[Tensor, float | None]:
        """Scores (K, k) given log Z of components ``index`` (k,), sorted positions in the flat list; and the drift."""
        edges = torch.tensor([0] + [len(start.named) for start in self.starts]).cumsum(0)
        found, drifts = [], []
        for g, group in enumerate(groups):
            chosen = [
                index[(index >= edges[s]) & (index < edges[s + 1])] - edges[s] for s in range(group.start, group.stop)
            ]
            if not sum(map(len, chosen)):
                continue
            forward = kept[g] if kept else self._forward(group, loud[group])
            where = (self.adapter, self.trace, self.prompt, forward.starts, forward.steps, chosen)
            rows = max(self.budget or 0, (1 << 28) if self.directions.device.type == "cpu" else (4 << 30))
            given = scores_given_z(*where, self.directions, self.end, self.n, self.settings, rows,
                                   forward.released, measure)  # fmt: skip
            found.append(given.scores.T.cpu())
            drifts += [] if given.drift is None else [given.drift]
        scores = torch.cat(found, dim=1) if found else torch.zeros(len(self.directions), 0)
        return scores, max(drifts, default=None)


def _settled(forward: Forward, s: int, count: int) -> Tensor:
    """Components of a start that there is nothing to be refined of: they start at the end, or were explicit to it."""
    start, rows = forward.starts[s], forward.rows
    done = torch.full((count,), start.entering not in [step.index for step in forward.steps])
    done[rows.member[(rows.owner == s) & (rows.member >= 0)].cpu()] = True
    return done


@dataclass
class _Second:
    """What follows the screening; ``flat`` (K, all) is changed in place."""

    sweep: Sweep
    groups: list[slice]
    kept: list[Forward]
    loud: list[Tensor]
    flat: Tensor
    settled: Tensor

    def run(self, method: Method) -> Estimate | None:
        screened = self.flat.clone()
        refined = self._largest(method)
        open_ = (~self.settled).nonzero()[:, 0]
        top = method.refine if method.refine else -(-self.flat.shape[1] // 100)
        top = min(top, self.flat.shape[1])
        drawn: list[Draw] = []
        exact = torch.full_like(self.flat, float("nan"))
        self._fill(exact, refined, False)
        self.flat[:, refined] = exact[:, refined]
        drift = None
        if method.sample:
            left = open_[~torch.isin(open_, refined)]
            generator = torch.Generator().manual_seed(method.seed)
            drawn = [draw(scores[left].abs(), left, top, method.sample, generator) for scores in self.flat]
            near = torch.cat([d.near for d in drawn]).unique()
            uniform = torch.cat([d.uniform for d in drawn]).unique()
            drift = self._fill(exact, uniform, True)
            self._fill(exact, near[~torch.isin(near, uniform)], False)
        if not drawn and not len(refined):
            return None
        return self._estimate(screened, exact, drawn, refined, top, drift)

    def _largest(self, method: Method) -> Tensor:
        """The components to be refined: the largest of any target, sorted."""
        chosen = []
        sizes = [len(start.named) for start in self.sweep.starts]
        for scores in self.flat.abs():
            parts, first = [(0, scores)], 0
            if method.within == "layer":
                parts = []
                for size in sizes:
                    parts.append((first, scores[first : first + size]))
                    first += size
            for first, part in parts:
                chosen.append(part.topk(min(method.refine, len(part))).indices + first)
        index = torch.cat(chosen).unique()
        return index[~self.settled[index]]

    def _fill(self, exact: Tensor, index: Tensor, measure: bool) -> float | None:
        if not len(index):
            return None
        found, drift = self.sweep.given_z(self.groups, self.kept, self.loud, index, measure)
        exact[:, index] = found.to(exact)
        return drift

    def _estimate(
        self, screened: Tensor, exact: Tensor, drawn: list[Draw], refined: Tensor, top: int, drift: float | None
    ) -> Estimate:
        """The worst target's figures."""
        figures = [judge(*pair, d, top) for *pair, d in zip(self.flat, exact, drawn, strict=True)] if drawn else []
        missed = [(f["missed"], f["missed_interval"]) for f in figures if f.get("missed") is not None]
        errors = None
        if len(refined):
            difference = (screened[:, refined] - exact[:, refined]).norm(dim=1)
            errors = float((difference / exact[:, refined].norm(dim=1).clamp_min(1e-30)).max())
        count = len(torch.cat([torch.cat([d.uniform, d.near]) for d in drawn]).unique()) if drawn else 0
        return Estimate(
            sample=count,
            spearman=min((f["spearman"] for f in figures if f["spearman"] is not None), default=None),
            relative_error=max((f["relative_error"] for f in figures if f["relative_error"] is not None), default=None),
            refined_error=errors,
            top=top,
            missed=max(missed)[0] if missed else None,
            missed_interval=max(missed)[1] if missed else None,
            partition_error=drift,
        )
