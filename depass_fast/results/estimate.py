"""The estimated error of approximate scores, as a result carries it (docs/adjoint.md, *Estimate*)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


class ApproximationWarning(UserWarning):
    """The estimate of an approximate result says that it is not to be relied upon."""


@dataclass(frozen=True)
class Estimate:
    """The error of approximate scores, estimated from components drawn at random; figures of the worst target.

    A continuation's are those of its worst step, each figure by itself, see :func:`worst_of`.

    Exact means: propagated by itself given log Z.

    sample: how many components were drawn: from all that were not carried, from the ranks next to the refined, and of
        every start layer by their scores.
    spearman: rank correlation with exact scores over those from all, or None with fewer than 8.
    relative_error: root mean square of the differences over that of the exact scores, over those from all.
    refined_error: by how much refinement moved the refined components, relatively; None without. A large one says that
        log Z was off, or that the first order is not enough: for the others, too.
    top: the K of ``missed``: as many as were refined, else one in a hundred.
    missed: the share of the true top K that is not among the refined; ``missed_interval`` is its 95 % interval.
    partition_error: the relative error of Z that the sample shows; None with too few.
    layer_errors: by start layer, the norm of the scores' errors over that of the scores, of the named components. It is
        estimated from components that are drawn by their scores, and from those most likely to be off; it is at
        least half of what the second pass changed.
    """

    sample: int
    spearman: float | None
    relative_error: float | None
    refined_error: float | None
    top: int
    missed: float | None
    missed_interval: tuple[float, float] | None
    partition_error: float | None
    layer_errors: Mapping[int, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as files and JSON hold them."""
        interval = None if self.missed_interval is None else list(self.missed_interval)
        layers = None if self.layer_errors is None else {str(k): v for k, v in self.layer_errors.items()}
        return asdict(self) | {"missed_interval": interval, "layer_errors": layers}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Estimate:
        """Return the estimate that :meth:`to_dict` wrote down."""
        interval, layers = values["missed_interval"], values.get("layer_errors")
        tables = {
            "missed_interval": None if interval is None else tuple(interval),
            "layer_errors": None if layers is None else {int(layer): error for layer, error in layers.items()},
        }
        return cls(**{**values, **tables})

    def __str__(self) -> str:
        found = [f"sample of {self.sample}"] if self.sample else []
        if self.spearman is not None:
            found.append(f"Spearman {self.spearman:.4f}")
        if self.relative_error is not None:
            found.append(f"error {self.relative_error:.1%}")
        if self.layer_errors:
            layer, error = max(self.layer_errors.items(), key=lambda item: item[1])
            found.append(f"worst layer {layer} {error:.1%}")
        if self.missed is not None and self.missed_interval is not None:
            low, high = self.missed_interval
            found.append(f"missed of the top {self.top}: {self.missed:.0%} ({low:.0%} to {high:.0%})")
        return ", ".join(found) or "no sample"


def estimate_dict(estimate: Estimate | None) -> dict[str, Any] | None:
    """Return an estimate as plain values; None stays None."""
    return None if estimate is None else estimate.to_dict()


def worst_of(estimates: Iterable[Estimate | None]) -> Estimate | None:
    """Return the estimate whose every figure is the worst of all; None where there is none.

    The largest errors, by layer, and the smallest rank correlation. ``sample`` and ``top`` are the largest, too: each
    figure rests on one draw, not on all of them. ``missed_interval`` is the largest of both ends.
    """
    found = [one for one in estimates if one is not None]
    if not found:
        return None
    intervals = [one.missed_interval for one in found if one.missed_interval is not None]
    tables = [one.layer_errors for one in found if one.layer_errors is not None]
    layers = sorted({layer for table in tables for layer in table})
    return Estimate(
        sample=max(one.sample for one in found),
        spearman=min((one.spearman for one in found if one.spearman is not None), default=None),
        relative_error=_largest(one.relative_error for one in found),
        refined_error=_largest(one.refined_error for one in found),
        top=max(one.top for one in found),
        missed=_largest(one.missed for one in found),
        missed_interval=(max(low for low, _ in intervals), max(high for _, high in intervals)) if intervals else None,
        partition_error=_largest(one.partition_error for one in found),
        layer_errors={n: max(table[n] for table in tables if n in table) for n in layers} if tables else None,
    )


def _largest(figures: Iterable[float | None]) -> float | None:
    return max((figure for figure in figures if figure is not None), default=None)
