"""Recurrences that write exponentials and divide by what they would give for ones, without large exponents.

A state is e^m times one that is held, m[t] = max(m[t-1] + decay[t], log_write[t]) as in mLSTM. So the exponents of
all writes and decays are at most zero.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..adapters import Recurrence
from .scan import scan


def stable(recurrence: Recurrence, lengths: list[int]) -> Recurrence:
    """Return the same recurrence of packed prompts of ``lengths`` with writes in the place of their logarithms.

    The queries are divided, so that nothing is left to be done behind the heads.
    """
    if recurrence.log_write is None:
        return recurrence
    assert recurrence.decay is not None
    given = (recurrence.q, recurrence.k, recurrence.decay[..., 0], recurrence.log_write)
    parts = [_stable(recurrence, *part) for part in zip(*(x.split(lengths) for x in given), strict=True)]
    q, decay, write = (torch.cat(part) for part in zip(*parts, strict=True))
    return replace(recurrence, q=q, decay=decay[..., None], write=write, log_write=None, divisor=None)


def _stable(
    recurrence: Recurrence, q: Tensor, k: Tensor, decay: Tensor, log_write: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return divided queries (N, H, n), decays (N, H) and writes (N, H) of one prompt.

    The sum of all decays from its beginning may be large, and exponents are small differences of such: in float64.
    """
    total = decay.double().cumsum(0)
    ahead = log_write.double() - total
    top = ahead.cummax(0).values.clamp_min(0.0)
    write, decay = (ahead - top).exp().to(q), -top.diff(dim=0, prepend=top[:1]).to(q)
    heads = write.shape[1]
    q, k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    if recurrence.divisor is None:
        return q, decay, write
    q_of, k_of, decay_of, write_of = (x.transpose(0, 1) for x in (q, k, decay[..., None], write))
    ones = q.new_ones(heads, len(q), 1)
    given = scan(q_of, k_of, decay_of, write_of, recurrence.corrects, ones)[..., 0].T
    return q / recurrence.divisor(given, (total + top).to(q))[..., None], decay, write
