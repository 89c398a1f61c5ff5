"""The completeness of exact results: the error that their dtypes explain, and the warning where there is more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..runtime.log import warn_user

_HALF = 32  # eps of half precision: up to 9 were measured on trained models and on all small families
_WIDE = 512  # eps of float32 or float64: up to 50 were measured, with many components in a sum
_FROM_THE_START = 64  # times the error of the start, which is only rounding: components may cancel
_QUANTISED = 0.25  # 8-bit activations round every product by 0.01


class CompletenessWarning(UserWarning):
    """The components of an exact result miss the hidden states or the logit by more than their dtypes explain."""


@dataclass(frozen=True)
class Rounding:
    """The rounding of a run: ``limit`` is the relative error that the ``coarsest`` of its dtypes explains."""

    coarsest: str
    limit: float

    @staticmethod
    def of(dtypes: Sequence[torch.dtype], products: float, quantised: bool) -> Rounding:
        """Return what ``dtypes`` explain; ``products`` is the relative rounding that the model's products may have."""
        coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        eps = max(torch.finfo(coarsest).eps, products)
        limit = (_HALF if eps > 1e-4 else _WIDE) * eps
        return Rounding(str(coarsest).removeprefix("torch."), max(limit, _QUANTISED) if quantised else limit)

    def explains(self, error: float, start: float) -> bool:
        """True if this explains an ``error`` of states that had the error ``start`` where they started."""
        return error <= max(self.limit, _FROM_THE_START * start)


def excess(error: float, rounding: Rounding, missed: str, is_own_rule: bool) -> str:
    """Return the text for components that miss something by ``error``, relatively."""
    cause = (
        "the shares of your own rule may not sum to one"
        if is_own_rule
        else "the model's weights may have been changed after the trace was taken: trace the prompt again (verify=True "
        "says whether the backend is off)"
    )
    return (
        f"the components miss {missed} by {error:.1e}, where rounding in {rounding.coarsest} explains "
        f"{rounding.limit:.1e}; {cause}"
    )


def warn_incomplete(text: str) -> None:
    """Issue a CompletenessWarning."""
    warn_user(f"completeness: {text}.", CompletenessWarning)
