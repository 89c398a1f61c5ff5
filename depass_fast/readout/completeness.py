"""The completeness of exact runs, judged by what their dtypes explain, once all that was measured is in host memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import Adapter
from ..adapters.stored import kind_of
from ..propagation.run import Run
from ..request import Request
from ..results.attribution import Attribution
from ..results.completeness import Rounding, excess, warn_incomplete
from ..runtime.precision import allowed_rounding


def warn_if_results_miss(request: Request, results: Sequence[tuple[Attribution, Tensor]]) -> None:
    """Add a warning to every result whose error is beyond what its dtypes explain, and issue one for the worst.

    Beside every result are the sizes (K,) of the products that its logits are sums of.
    """
    rounding, found = rounding_of(request.adapter, request.run), []
    for result, sizes in results:
        errors = result.layer_errors.double().numpy()  # in host memory, as the scores are
        start, worst = float(errors[0]), float(errors.max())
        if not rounding.explains(worst, start):
            found.append((worst, result, "the hidden states"))
        elif not rounding.explains(off := off_the_logit(result, sizes), start):
            found.append((off, result, "the logit"))
    if not found:
        return
    worst, _, missed = max(found, key=lambda one: one[0])
    text = excess(worst, rounding, missed, callable(request.run.allocation.rule))
    for _, result, _ in found:
        result.warnings = [*(result.warnings or []), text]
    warn_incomplete(text)


def warn_if_logits_miss(
    request: Request, results: Sequence[tuple[Attribution, Tensor]], computed: torch.dtype, start: float = 0.0
) -> None:
    """Do as :func:`warn_if_results_miss` for results that no states were carried for; products ran in ``computed``.

    ``start`` is the relative error of what was frozen, which is no fault of theirs.
    """
    rounding, found = rounding_of(request.adapter, request.run, computed), []
    for result, sizes in results:
        if not rounding.explains(off := off_the_logit(result, sizes), start):
            found.append((off, result))
    if not found:
        return
    text = excess(max(off for off, _ in found), rounding, "the logit", False)
    for _, result in found:
        result.warnings = [*(result.warnings or []), text]
    warn_incomplete(text)


def warn_if_states_miss(adapter: Adapter, run: Run, errors: Sequence[Tensor]) -> None:
    """Issue a warning if completeness errors (P,), at the start and after every layer, are more than dtypes explain."""
    found, rounding = torch.stack(list(errors)), rounding_of(adapter, run)
    start, worst = torch.stack([found[0].max(), found.max()]).tolist()
    if not rounding.explains(worst, start):
        warn_incomplete(excess(worst, rounding, "the hidden states", callable(run.allocation.rule)))


def rounding_of(adapter: Adapter, run: Run, computed: torch.dtype | None = None) -> Rounding:
    """Return the rounding that a run's dtypes explain; ``computed`` are products and states of another dtype."""
    dtypes = adapter.dtype, computed or run.state_dtype, computed or run.compute_dtype or run.state_dtype
    products = allowed_rounding() if adapter.dtype == torch.float32 else 0.0
    return Rounding.of(
        dtypes,
        products,
        any(kind_of(module) is not None for module in adapter.weighty(0, run.allocation.needs_activations)),
    )


def off_the_logit(result: Attribution, sizes: Tensor) -> float:
    """Return how far the scores' sum is off the logit, relative to the scores and to the products of the logit (K,)."""
    scores = result.scores.view(len(sizes), -1)
    off = (scores.sum(1) - result.target_logits.view(-1)).abs()
    return float((off / (scores.abs().sum(1) + sizes).clamp_min(torch.finfo(scores.dtype).tiny)).numpy().max())
