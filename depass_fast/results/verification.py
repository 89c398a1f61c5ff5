"""How far a backend is off the reference operations: what ``verify=True`` found."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce


class VerificationWarning(UserWarning):
    """A backend is further off the reference operations than its dtypes explain."""


@dataclass(frozen=True)
class Verification:
    """How far a backend is off the reference operations, of ``compared`` positions at steps of layers.

    ``error`` is ‖backend's - reference's‖ over the components of one position after one step, relative to the larger of
    both; ``where`` says of which. Up to ``limit`` rounding explains it: √eps of the coarsest dtype involved.

    A step that adds little could do anything within that. So ``added`` is the same difference relative to the larger of
    what both add to the state, without what rounding explains of every number, however little is added to it: eps of
    the state's dtype, and 32 times that of the sums inside a product, float32's or float64's. What is left comes of the
    products and of several roundings in a row, and is allowed √eps, too (``added_limit``, ``added_where``).

    Rules that jump at a tie (all but `softmax` and `taylor`) are allowed 2.0 in half precision, which is anything. Of
    all that was compared, these are what is furthest beyond its limit, or nearest to it.
    """

    error: float = 0.0
    where: str = ""
    compared: int = 0
    limit: float = 0.0
    added: float = 0.0
    added_where: str = ""
    added_limit: float = 0.0

    @property
    def passed(self) -> bool:
        return self.error <= self.limit and self.added <= self.added_limit

    def __str__(self) -> str:
        return f"{self.error:.1e} off the reference, {self.added:.1e} in what a step adds, {self.compared} compared"

    def meet(self, other: Verification) -> Verification:
        """Of both together."""
        rows = max(self, other, key=lambda one: _excess(one.error, one.limit))
        steps = max(self, other, key=lambda one: _excess(one.added, one.added_limit))
        added = {name: getattr(steps, name) for name in ("added", "added_where", "added_limit")}
        return replace(rows, compared=self.compared + other.compared, **added)


def _excess(error: float, limit: float) -> float:
    """An error in units of its limit; -1 where nothing was compared."""
    return error / limit if limit else -1.0


def merged(found: Iterable[Verification | None]) -> Verification | None:
    """Of several, all that differ; None where there is none."""
    found = dict.fromkeys(one for one in found if one is not None)
    return reduce(Verification.meet, found) if found else None


def warned(found: Verification | None, backend: str) -> list[str] | None:
    """What is to be said of a verification that failed; it is also given as a warning. None where nothing is."""
    if found is None or found.passed:
        return None
    both = (
        (found.error, found.limit, f"at {found.where}"),
        (found.added, found.added_limit, f"in what is added by {found.added_where}"),
    )
    off = [f"by {e:.1e} {place}, where rounding explains {limit:.1e}" for e, limit, place in both if not e <= limit]
    text = (
        f"the {backend} backend is off the reference operations {' and '.join(off)}; take backend='reference' to see "
        "what it does to the scores, and report it"
    )
    warnings.warn(f"verify: {text}.", VerificationWarning, stacklevel=4)
    return [text]
