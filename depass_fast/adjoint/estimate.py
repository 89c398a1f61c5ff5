"""The distance of a sweep's scores from exact propagation, estimated from a sample (docs/adjoint.md, *Estimate*)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..results.estimate import Estimate
from .loud import Loud

# A result beyond these carries a warning.
LEAST_SPEARMAN, MOST_MISSED, MOST_MOVED, MOST_INCOMPLETE = 0.98, 0.1, 0.25, 0.01
MOST_OF_A_LAYER = 0.03  # the estimated error of a start layer
FEWEST_OF_A_LAYER, IN_DANGER = 3, 3  # components drawn by their scores, and those most likely to be off
_ADVICE = "refine more of every layer, as Adjoint(refine=256, within='layer'), or take method='exact'"
_Z = 1.96  # the quantile of a 95 % interval


@dataclass(frozen=True)
class Draw:
    """Positions in the flat list of components: ``uniform`` from all screened ones, ``near`` from the next ranks.

    ``n_near`` and ``n_far`` say how many there are to draw from; near ones are no part of the far ones.
    """

    uniform: Tensor
    near: Tensor
    n_near: int
    n_far: int


@dataclass(frozen=True)
class Figures:
    """The figures of one target, named as those of :class:`Estimate`; None where too few were drawn."""

    spearman: float | None
    relative_error: float | None
    missed: float | None = None
    missed_interval: tuple[float, float] | None = None


def draw(ranking: Tensor, screened: Tensor, top: int, sample: int, generator: torch.Generator) -> Draw:
    """Choose ``sample`` of the components ``screened`` (U,) whose |score| is ``ranking`` (U,)."""
    order = screened[ranking.argsort(descending=True, stable=True)]
    n_near = min(len(order), 4 * top)
    half = min(sample // 2, n_near)
    near = order[torch.randperm(n_near, generator=generator, device="cpu")[:half]]
    uniform = order[torch.randperm(len(order), generator=generator, device="cpu")[: sample - half]]
    return Draw(uniform, near, n_near, len(order) - n_near)


def judge(final: Tensor, exact: Tensor, drawn: Draw, top: int) -> Figures:
    """Return the figures of one target: ``final`` (all,) scores as they are returned, ``exact`` (all,) where drawn."""
    linear, truth = final[drawn.uniform], exact[drawn.uniform]
    size = truth.square().mean().sqrt()
    error = (linear - truth).square().mean().sqrt()
    relative = float(error / size) if len(truth) and float(size) else (0.0 if not float(error) else None)
    missed, interval = _missed(final, exact, drawn, top) if len(drawn.near) else (None, None)
    return Figures(
        spearman=spearman(linear, truth) if len(truth) >= 8 else None,
        relative_error=relative if len(truth) else None,
        missed=missed,
        missed_interval=interval,
    )


@dataclass(frozen=True)
class Sample:
    """The findings of ``count`` components drawn at random: every target's ``figures``, and errors by layer."""

    figures: Sequence[Figures] = ()
    count: int = 0
    partition_error: float | None = None
    layers: Mapping[int, float] = field(default_factory=dict)


def draw_by_size(
    scores: Tensor, left: Tensor, starts: int, sample: int, explicit: Loud, generator: torch.Generator
) -> Tensor:
    """Choose components of one of ``starts`` start layers, among those that are ``left`` (M,) bool: indices (k,).

    They are drawn by the size of their ``scores`` (K, M) in any target. With them come those that are most in danger to
    be off: large scores of components that are nearly loud enough to be ``explicit``.
    """
    sizes = (scores.square() / scores.square().sum(1, keepdim=True).clamp_min(1e-30)).sum(0).sqrt() * left
    danger = (sizes[explicit.next] * explicit.gates.to(sizes)).topk(min(IN_DANGER, len(explicit.next))).indices
    doubtful = explicit.next[danger]
    count = min(max(FEWEST_OF_A_LAYER, sample // (2 * starts)), int((sizes > 0).sum()))
    if not count:
        return doubtful
    return torch.cat([torch.multinomial(sizes.double(), count, generator=generator), doubtful]).unique()


def layer_error(scores: Tensor, exact: Tensor, left: Tensor) -> float:
    """Return the relative error of a start layer's ``scores`` (K, M), where ``exact`` (K, M) is known for a sample.

    The error is taken to be that of the components drawn, and to be as large for the others, relative to their scores.
    The largest of the errors is one component's: it counts for itself, not for others. The components that are not
    ``left`` (M,) count as right. The worst target's.
    """
    known = ~exact.isnan()
    off = torch.where(known, scores - exact, 0.0).square()
    largest = off.amax(1) if off.shape[1] else off.new_zeros(len(off))
    seen = torch.where(known, exact, 0.0).square().sum(1)
    ratio = (off.sum(1) - largest) / seen.clamp_min(1e-30)
    others = torch.where(~known & left, scores, 0.0).square().sum(1)
    found = off.sum(1) + others * ratio
    size = torch.where(known, exact, scores).square().sum(1)
    return float((found / size.clamp_min(1e-30)).max().sqrt())


def relative_change(now: Tensor, before: Tensor) -> float:
    """Return by how much scores (K, M) have changed, relative to their norm: the worst target's."""
    return float(((now - before).norm(dim=1) / now.norm(dim=1).clamp_min(1e-30)).max())


def worst(
    sample: Sample, top: int, refined_error: float | None = None, moved: Mapping[int, float] | None = None
) -> Estimate:
    """Return the estimate that the worst target's figures make.

    ``moved`` says by how much the second pass changed each start layer. A pass is taken to be off by half as much as
    the one before it: that shows an error of log Z, which components propagated given log Z share.
    """
    figures, moved = sample.figures, moved or {}
    layers = {layer: max(error, 0.5 * moved.get(layer, 0.0)) for layer, error in sample.layers.items()}
    missed = [(f.missed, f.missed_interval) for f in figures if f.missed is not None and f.missed_interval is not None]
    most_missed, interval = max(missed, default=(None, None))
    return Estimate(
        sample=sample.count,
        spearman=min((f.spearman for f in figures if f.spearman is not None), default=None),
        relative_error=max((f.relative_error for f in figures if f.relative_error is not None), default=None),
        refined_error=refined_error,
        top=top,
        missed=most_missed,
        missed_interval=interval,
        partition_error=sample.partition_error,
        layer_errors=layers,
    )


def _missed(final: Tensor, exact: Tensor, drawn: Draw, top: int) -> tuple[float, tuple[float, float]]:
    """Return the share of the true top K that was left out, and its interval.

    Misses near the refined ranks are counted (Wilson's interval). Far from them a miss needs an error of at least the
    gap to the K-th score: Markov's inequality says how many can have it, given the mean square error of the draw.
    """
    threshold = float(final.abs().topk(top).values[-1])
    hits = int((exact[drawn.near].abs() > threshold).sum())
    low, high = wilson(hits, len(drawn.near))
    near = hits / len(drawn.near) * drawn.n_near
    errors = (final[drawn.uniform] - exact[drawn.uniform]).square()
    far_limit = 0.0
    if drawn.n_far and len(errors):
        reach = final[drawn.near].abs().min()  # nearly all far ones are below the least of the near ones drawn
        gap = max(threshold - float(reach), 0.0)
        far_limit = drawn.n_far * min(1.0, float(errors.mean()) / gap**2) if gap else float(drawn.n_far)
    limits = (low * drawn.n_near, high * drawn.n_near + far_limit)
    return near / (near + top), (limits[0] / (limits[0] + top), limits[1] / (limits[1] + top))


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of which ``hits`` of ``trials`` were seen."""
    if not trials:
        return 0.0, 1.0
    p, z2 = hits / trials, _Z**2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * (p * (1 - p) / trials + z2 / (4 * trials**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def spearman(a: Tensor, b: Tensor) -> float:
    """Return the rank correlation of two vectors; equal values share their mean rank. 1.0 where both are constant."""
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


def warnings_of(
    estimate: Estimate | None, completeness_error: float, most_incomplete: float = MOST_INCOMPLETE
) -> list[str]:
    """Return the warnings that an approximate result carries: what is off, and what to do."""
    said = []
    if completeness_error > most_incomplete:
        said.append(
            f"the shares miss the logit by {completeness_error:.2%} of their magnitude; if weights were changed after "
            "the trace, take another trace"
        )
    if estimate is None:
        return said
    bad = {layer: error for layer, error in (estimate.layer_errors or {}).items() if error > MOST_OF_A_LAYER}
    if bad:
        listed = ", ".join(f"layer {layer} by {error:.0%}" for layer, error in sorted(bad.items()))
        said.append(f"the scores of {listed} are off; {_ADVICE} for these layers")
    sure = None if estimate.missed_interval is None else estimate.missed_interval[0]
    checks = (
        (estimate.refined_error, MOST_MOVED, "refinement moved the largest scores by {:.0%}"),
        (sure, MOST_MISSED, f"at least {{:.0%}} of the true top {estimate.top} were not refined"),
    )
    if estimate.spearman is not None and estimate.spearman < LEAST_SPEARMAN:
        said.append(f"a sample's rank correlation with exact scores is {estimate.spearman:.3f}; {_ADVICE}")
    found = [text.format(value) for value, most, text in checks if value is not None and value > most]
    return said + [f"{text}; {_ADVICE}" for text in found]
