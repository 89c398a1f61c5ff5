"""How far the sweep's scores are from exact propagation, estimated from a sample (docs/adjoint.md, *Estimate*)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# Beyond these a result carries a warning.
LEAST_SPEARMAN, MOST_ERROR, MOST_MISSED, MOST_MOVED, MOST_INCOMPLETE = 0.98, 0.1, 0.1, 0.25, 0.01
_Z = 1.96  # of a 95 % interval


class ApproximationWarning(UserWarning):
    """An approximate result whose own estimate says that it is not to be relied upon."""


@dataclass(frozen=True)
class Estimate:
    """Screened scores against exact propagation given log Z, of components drawn at random; the worst target's.

    sample: how many were drawn; half of them from all that were not refined, half from the ranks next to the refined.
    spearman: rank correlation over the first half, or None with fewer than 8.
    relative_error: root mean square of the differences over that of the exact scores, over the first half.
    refined_error: by how much refinement moved the refined components, relatively; None without. A large one says that
        log Z was off, or that the first order is not enough: for the others, too.
    top: the K of ``missed``: as many as were refined, else one in a hundred.
    missed: the share of the true top K that is not among the refined; ``missed_interval`` is its 95 % interval.
    partition_error: by how much, relatively, Z is off, as the sample shows it; None with too few.
    """

    sample: int
    spearman: float | None
    relative_error: float | None
    refined_error: float | None
    top: int
    missed: float | None
    missed_interval: tuple[float, float] | None
    partition_error: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as results keep them."""
        found = asdict(self)
        found["missed_interval"] = None if self.missed_interval is None else list(self.missed_interval)
        return found


@dataclass(frozen=True)
class Draw:
    """Positions in the flat list of components: ``uniform`` from all screened ones, ``near`` from the next ranks.

    ``n_near`` and ``n_far`` say how many there are to draw from; near ones are no part of the far ones.
    """

    uniform: Tensor
    near: Tensor
    n_near: int
    n_far: int


def draw(ranking: Tensor, screened: Tensor, top: int, sample: int, generator: torch.Generator) -> Draw:
    """Choose ``sample`` of the components ``screened`` (U,) whose |score| is ``ranking`` (U,)."""
    order = screened[ranking.argsort(descending=True, stable=True)]
    n_near = min(len(order), 4 * top)
    half = min(sample // 2, n_near)
    near = order[torch.randperm(n_near, generator=generator, device="cpu")[:half]]
    uniform = order[torch.randperm(len(order), generator=generator, device="cpu")[: sample - half]]
    return Draw(uniform, near, n_near, len(order) - n_near)


def judge(final: Tensor, exact: Tensor, drawn: Draw, top: int) -> dict[str, Any]:
    """The figures of one target: ``final`` (all,) scores as they are returned, ``exact`` (all,) where drawn."""
    linear, truth = final[drawn.uniform], exact[drawn.uniform]
    size = truth.square().mean().sqrt()
    error = (linear - truth).square().mean().sqrt()
    relative = float(error / size) if len(truth) and float(size) else (0.0 if not float(error) else None)
    found = {
        "spearman": spearman(linear, truth) if len(truth) >= 8 else None,
        "relative_error": relative if len(truth) else None,
    }
    if len(drawn.near):
        found["missed"], found["missed_interval"] = _missed(final, exact, drawn, top)
    return found


def _missed(final: Tensor, exact: Tensor, drawn: Draw, top: int) -> tuple[float, tuple[float, float]]:
    """The share of the true top K that was left out, and its interval.

    Near the refined ranks by counting (Wilson's interval). Far from them a miss needs an error of at least the gap to
    the K-th score: by Markov's inequality that many can have it, given the mean square error of the draw.
    """
    bar = float(final.abs().topk(top).values[-1])
    hits = int((exact[drawn.near].abs() > bar).sum())
    low, high = wilson(hits, len(drawn.near))
    near = hits / len(drawn.near) * drawn.n_near
    errors = (final[drawn.uniform] - exact[drawn.uniform]).square()
    far_limit = 0.0
    if drawn.n_far and len(errors):
        reach = final[drawn.near].abs().min()  # far ones are, but for few, below the least of the near ones drawn
        gap = max(bar - float(reach), 0.0)
        far_limit = drawn.n_far * min(1.0, float(errors.mean()) / gap**2) if gap else float(drawn.n_far)
    limits = (low * drawn.n_near, high * drawn.n_near + far_limit)
    return near / (near + top), (limits[0] / (limits[0] + top), limits[1] / (limits[1] + top))


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share of which ``hits`` of ``trials`` were seen."""
    if not trials:
        return 0.0, 1.0
    p, z2 = hits / trials, _Z**2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * (p * (1 - p) / trials + z2 / (4 * trials**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors; equal values share their mean rank. 1.0 where both are constant."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    norms = ranks.norm(dim=1)
    if not float(norms.prod()):
        return float(not float(norms.sum()))
    return float((ranks[0] @ ranks[1]) / norms.prod())


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def warnings_of(estimate: dict[str, Any] | None, completeness_error: float) -> list[str]:
    """What is to be said loudly of an approximate result."""
    said = []
    if completeness_error > MOST_INCOMPLETE:
        said.append(f"the shares miss the logit by {completeness_error:.1%} of their magnitude")
    e = estimate or {}
    if e.get("spearman") is not None and e["spearman"] < LEAST_SPEARMAN:
        said.append(f"a sample's rank correlation with exact scores is {e['spearman']:.3f}")
    if e.get("relative_error") is not None and e["relative_error"] > MOST_ERROR:
        said.append(f"a sample's relative error is {e['relative_error']:.1%}")
    if e.get("refined_error") is not None and e["refined_error"] > MOST_MOVED:
        said.append(f"refinement moved the largest scores by {e['refined_error']:.0%}")
    if e.get("missed") is not None and e["missed"] > MOST_MISSED:
        said.append(f"about {e['missed']:.0%} of the true top {e['top']} were not refined")
    if e.get("partition_error") is not None and e["partition_error"] > MOST_ERROR:
        said.append(f"the partition function is off by {e['partition_error']:.0%}")
    return said
