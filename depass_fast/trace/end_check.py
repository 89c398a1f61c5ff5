"""The consistency check of the end: a traced forward pass ends as the ordinary one does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .consistency import Consistency, differences
from .head_experts import CHOSEN, WEIGHTS
from .record import Trace
from .selection import selected
from .untouched import UntouchedPass

_RECURRENT = 0.25  # in half precision: a recurrence adds up what a softmax averages, and with it the model's rounding
_HALF = (
    " It may also be rounding: in half precision the recurrences of a long prompt add it up. Try the model in float32, "
    "model.float()."
)


def check_end(trace: Trace, records: list[dict[str, Any]], own: UntouchedPass, dtype: torch.dtype) -> None:
    """Compare the last prompt's states with those of the untouched model.

    They are compared at the end where all routers, and indexers of sparse attention, decided the same. Near a tie one
    may decide otherwise, which moves its position by half of its size. Such a position is compared by what entered that
    decision, and so is every later position, which may look at it. Most of these move by little: the median position is
    also held to the tolerance, as far as its own decisions agree.

    Raises:
        RuntimeError: they differ.
    """
    found, first = Consistency(), trace.span(trace.n_prompts - 1).start
    span, device = slice(first, first + len(own.end)), own.end.device
    tolerance = 1e-3
    if dtype.itemsize < 4:  # of the weights: Mamba's residual stream may be wider
        tolerance = _RECURRENT if any(x.attention and x.attention.recurrence for x in trace.layers) else 0.1
    ends, read = trace.normed_final[span], []
    agree = torch.zeros(len(own.decisions), len(own.end), dtype=torch.bool, device=device)
    for row, (index, its) in zip(agree, own.decisions, strict=True):
        got = {name: records[index][name][span] for name in its}
        entry = "experts_input" if "experts_input" in its else "resid_pre"
        read.append(differences(got[entry], its[entry]).to(device))
        names = ("chosen", "router_weights") if "chosen" in its else (CHOSEN, WEIGHTS)
        row.copy_(_same_selection(got, its) if "chosen_keys" in its else _same_decision(got, its, names, tolerance))
    apart = torch.stack([*read, differences(ends, own.end.to(ends)).to(device)])  # (decisions + 1, N)
    alone = agree.cumprod(0).sum(0)  # (N,) decisions before a position's first disagreement
    for reached, worst in ((alone.cummin(0).values, torch.max), (alone, torch.median)):
        found.note(
            "the traced forward pass ends otherwise than the ordinary one: its attention, its mask or its positions",
            worst(apart.gather(0, reached[None])),
            tolerance,
        )
    found.verdict(advice=_HALF if tolerance == _RECURRENT else "")


def _same_decision(got: dict[str, Tensor], own: dict[str, Tensor], names: tuple[str, str], tolerance: float) -> Tensor:
    """True where two passes chose the same experts with about the same weights: (N,). A sparse mixer's may jump."""
    chosen, weighed = names
    order, own_order = got[chosen].argsort(1), own[chosen].argsort(1)
    same = (got[chosen].gather(1, order) == own[chosen].gather(1, own_order)).all(1)
    weights, own_weights = got[weighed].gather(1, order), own[weighed].gather(1, own_order)
    return same & (differences(weights, own_weights) <= tolerance)


def _same_selection(got: dict[str, Tensor], own: dict[str, Tensor]) -> Tensor:
    """True where two passes selected the same keys, of those that a query may see: (N,)."""
    seen = [selected(its["chosen_keys"], len(its["chosen_keys"])) for its in (got, own)]
    seen = [one.tril() if one.ndim == 2 else one.flatten(1) for one in seen]  # of blocks, all are those it may see
    return (seen[0] == seen[1].to(seen[0].device)).all(1)
