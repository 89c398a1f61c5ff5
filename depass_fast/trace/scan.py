"""A frozen recurrence applied to values: chunk by chunk, linear in them, and differentiable.

Every exponent is a sum of logarithms of decays between two positions, at most zero: nothing overflows, however long the
prompt is.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GONE = -40.0  # the logarithm below which a decay is zero: its products would be denormal numbers, which are slow
_CHUNK = 64  # positions at a time where a head's state decays as one
_CHUNK_BY_CHANNEL = 16  # where every channel of it decays by itself: their products are (C, C, n)


def scan(
    q: Tensor,
    k: Tensor,
    decay: Tensor,
    write: Tensor | None,
    corrects: bool,
    x: Tensor,
    nothing: float = 0.0,
    before: bool = False,
) -> Tensor:
    """Apply a recurrence, without its skip, to values: x (H, N, F) -> (H, N, F).

    Args:
        q, k: (H, N, n) in x's dtype, as are the others.
        decay: (H, N, 1) or (H, N, n), at most zero.
        write: (H, N); None: one.
        corrects: True for the delta rule (DESIGN.md section 10).
        before: True if a head reads the state in front of its own position's decay and write.
        nothing: What is smaller becomes zero on its way, as products of it would be denormal numbers, which are slow.
    """
    size = _CHUNK if decay.shape[2] == 1 else _CHUNK_BY_CHANNEL
    state = x.new_zeros(x.shape[0], k.shape[2], x.shape[2])
    parts = []
    for at in (slice(first, first + size) for first in range(0, x.shape[1], size)):
        qc, kc, xc, total = q[:, at], k[:, at], x[:, at], decay[:, at].cumsum(1)
        reading = torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1]], 1) if before else total
        decayed = _exp(total)
        if corrects:
            xc = xc - (kc * decayed) @ state
        if write is not None:
            xc = xc * write[:, at, None]
        if corrects:
            among = _between(kc, kc, total, total, -1)
            among = among if write is None else among * write[:, at, None]
            one = torch.eye(xc.shape[1], dtype=x.dtype, device=x.device)
            xc = torch.linalg.solve_triangular(one + among, xc, upper=False, unitriangular=True)
        xc = _cut(xc, nothing)
        parts.append(_between(qc, kc, reading, total, -int(before)) @ xc + (qc * _exp(reading)) @ state)
        last = total[:, -1:]
        state = _cut(_exp(last).transpose(1, 2) * state + (kc * _exp(last - total)).transpose(1, 2) @ xc, nothing)
    return torch.cat(parts, 1)


def _between(q: Tensor, k: Tensor, reading: Tensor, total: Tensor, diagonal: int) -> Tensor:
    """Return what queries meet of keys that came before, as far as these have not decayed: (H, C, C)."""
    c = q.shape[1]
    seen = torch.ones(c, c, dtype=torch.bool, device=q.device).tril(diagonal)
    apart = (reading[:, :, None] - total[:, None]).masked_fill(~seen[..., None], -torch.inf)  # (H, C, C, 1 | n)
    apart = _exp(apart)
    if apart.shape[3] == 1:
        return (q @ k.transpose(1, 2)) * apart[..., 0]
    return torch.einsum("hin,hjn,hijn->hij", q, k, apart)


def _cut(x: Tensor, nothing: float) -> Tensor:
    return x.masked_fill(x.abs() < nothing, 0.0) if nothing else x


def _exp(logarithm: Tensor) -> Tensor:
    return logarithm.masked_fill(logarithm < _GONE, -torch.inf).exp()
