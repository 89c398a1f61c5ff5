"""The distance of a backend from the reference operations, as ``verify=True`` measures it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce

from ..runtime.log import warn_user


class VerificationWarning(UserWarning):
    """A backend is further off the reference operations than its dtypes explain."""


@dataclass(frozen=True)
class Verification:
    """The distance of a backend from the reference operations, at ``compared`` positions after steps of layers.

    ``error`` is ‖backend's - reference's‖ over the components of one position after one step, relative to the larger
    norm of both; ``where`` names the position and step. Up to ``limit``, √eps of the coarsest dtype involved, rounding
    explains it.

    A step that adds little could do anything within that limit. So ``added`` is the same difference relative to the
    larger of what both add to the state. It leaves out the rounding of every number, however little is added to it: eps
    of the state's dtype, and 32 times the eps of the sums inside a product, float32's or float64's. The remainder comes
    from the products and from several roundings in a row; it may reach √eps, too (``added_limit``, ``added_where``).

    Rules that jump at a tie (all but `softmax` and `taylor`) may reach 2.0 in half precision, which is anything. The
    figures are those of the comparison that is furthest beyond its limit, or nearest to it.
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
        """True if both errors are within their limits."""
        return self.error <= self.limit and self.added <= self.added_limit

    def __str__(self) -> str:
        return f"{self.error:.1e} off the reference, {self.added:.1e} in what a step adds, {self.compared} compared"

    def meet(self, other: Verification) -> Verification:
        """Return the verification of both together."""
        rows = max(self, other, key=lambda one: _excess(one.error, one.limit))
        steps = max(self, other, key=lambda one: _excess(one.added, one.added_limit))
        added = {name: getattr(steps, name) for name in ("added", "added_where", "added_limit")}
        return replace(rows, compared=self.compared + other.compared, **added)


def _excess(error: float, limit: float) -> float:
    """Return an error in units of its limit; -1 where nothing was compared."""
    return error / limit if limit else -1.0


def merge(found: Iterable[Verification | None]) -> Verification | None:
    """Return several verifications as one, equal ones counted once; None where there is none."""
    different = list(dict.fromkeys(one for one in found if one is not None))
    return reduce(Verification.meet, different) if different else None


def warn_if_off(found: Verification | None, backend: str) -> list[str] | None:
    """Issue a VerificationWarning for a verification that failed, and return its text for the result; else None."""
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
    warn_user(f"verify: {text}.", VerificationWarning)
    return [text]
