"""Recurrences that write exponentials and divide by what they would give for ones, without large exponents.

A state is e^m times one that is held, m[t] = max(m[t-1] + decay[t], log_write[t]) as in mLSTM. So the exponents of
all writes and decays are at most zero.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..adapters import Recurrence
from .scan import Steps, parts_of_heads, scan


def stable(recurrence: Recurrence, lengths: list[int]) -> Recurrence:
    """Return the same recurrence of packed prompts of ``lengths`` with writes in the place of their logarithms.

    What divides goes into the queries, so that nothing is left to be done behind the heads.
    """
    if recurrence.log_write is None:
        return recurrence
    parts, first = [], 0
    for length in lengths:
        parts.append(_stable(recurrence, slice(first, first + length)))
        first += length
    q, decay, write, own = (torch.cat(part) for part in zip(*parts, strict=True))
    own = None if recurrence.log_own is None else own
    held = {"q": q, "decay": decay[..., None], "write": write, "own": own}
    return replace(recurrence, **held, log_write=None, log_own=None, divisor=None)


def _stable(recurrence: Recurrence, at: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return divided queries (N, H, n), decays, writes, and what positions give themselves, (N, H), of one prompt.

    The sum of all decays from its beginning may be large, and exponents are small differences of such: in float64.
    """
    assert recurrence.decay is not None and recurrence.log_write is not None
    total = recurrence.decay[at, :, 0].double().cumsum(0)
    ahead = recurrence.log_write[at].double() - total
    top = ahead.cummax(0).values
    q, k, heads = recurrence.q[at], recurrence.k[at], ahead.shape[1]
    q, k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    if recurrence.log_own is None:  # mLSTM: m begins at zero
        top = top.clamp_min(0.0)
    write, decay = (ahead - top).exp().to(q), -top.diff(dim=0, prepend=top[:1]).to(q)
    every = [x.transpose(0, 1) for x in (q, k, decay[..., None], write)]
    ones, before = q.new_ones(heads, len(q), 1), recurrence.log_own is not None
    given = torch.empty_like(ones)
    for part in parts_of_heads(heads, 1, q.shape[2], False, not q.is_cuda):
        steps = Steps(*(x[part] for x in every))
        scan(steps.at, recurrence.corrects, ones[part], before=before, out=given[part])
    given = given[..., 0].T
    if recurrence.log_own is None:
        divisor = (
            torch.ones_like(given) if recurrence.divisor is None else recurrence.divisor(given, (total + top).to(q))
        )
        return q / divisor[..., None], decay, write, write
    # the state in front of a position is e^m times the one that is held, and m may be less than the position's own
    own, m = recurrence.log_own[at].double(), (total + top).roll(1, 0)
    m[0] = -torch.inf
    most = torch.maximum(m, own)
    reads, own = (m - most).exp().to(q), (own - most).exp().to(q)
    divisor = reads * given + own
    return q * (reads / divisor)[..., None], decay, write, own / divisor
