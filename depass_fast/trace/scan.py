"""A frozen recurrence applied to values, or its transpose to gradients: chunk by chunk, and linear in them.

Every exponent is a sum of logarithms of decays between two positions, at most zero: nothing overflows, however long the
prompt is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_GONE = -40.0  # the logarithm below which a decay is zero: its products would be denormal numbers, which are slow
_CHUNK = 64  # positions at a time where a head's state decays as one
SCANNED, SCANNED_CUDA = 1 << 20, 1 << 26  # numbers of heads' keys, values or chunks that are held at once
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
    state, out = x.new_zeros(x.shape[0], k.shape[2], x.shape[2]), torch.empty_like(x)
    for at in _chunks(decay):
        chunk, xc = _Chunk.of(q[:, at], k[:, at], decay[:, at], corrects, _at(write, at), before), x[:, at]
        if chunk.corrected is not None:
            xc = xc - chunk.corrected @ state
        if write is not None:
            xc = xc * write[:, at, None]
        if chunk.among is not None:
            xc = torch.linalg.solve_triangular(chunk.among, xc, upper=False, unitriangular=True)
        xc = _cut(xc, nothing)
        out[:, at] = chunk.here @ xc + chunk.reads @ state
        state = _cut(chunk.keeps * state + chunk.writes.transpose(1, 2) @ xc, nothing)
    return out


def scan_back(
    q: Tensor,
    k: Tensor,
    decay: Tensor,
    write: Tensor | None,
    corrects: bool,
    y: Tensor,
    nothing: float = 0.0,
    before: bool = False,
) -> Tensor:
    """Apply the transpose of :func:`scan` to gradients of what heads give: y (H, N, F) -> (H, N, F).

    The chunks are taken from the last to the first, and the gradient of the state goes from one to the one before. No
    more than a chunk is held. Arguments are as of :func:`scan`.
    """
    state, out = y.new_zeros(y.shape[0], k.shape[2], y.shape[2]), torch.empty_like(y)
    for at in reversed(_chunks(decay)):
        chunk, yc = _Chunk.of(q[:, at], k[:, at], decay[:, at], corrects, _at(write, at), before), y[:, at]
        xc = _cut(chunk.here.transpose(1, 2) @ yc + chunk.writes @ state, nothing)
        state = chunk.keeps * state + chunk.reads.transpose(1, 2) @ yc
        if chunk.among is not None:
            xc = torch.linalg.solve_triangular(chunk.among.transpose(1, 2), xc, upper=True, unitriangular=True)
        if write is not None:
            xc = xc * write[:, at, None]
        if chunk.corrected is not None:
            state = state - chunk.corrected.transpose(1, 2) @ xc
        out[:, at], state = xc, _cut(state, nothing)
    return out


class _Chunk(NamedTuple):
    """The maps of C positions: of their values, and of the state (H, n, F) that they find.

    here: (H, C, C), from what is written to what heads give.
    reads, writes: (H, C, n), from the state to what heads give, and (transposed) from what is written to the state.
    keeps: (H, 1 | n, 1), the part of the state that is left.
    corrected, among: (H, C, n) and (H, C, C), what the delta rule takes off; None without it.
    """

    here: Tensor
    reads: Tensor
    writes: Tensor
    keeps: Tensor
    corrected: Tensor | None
    among: Tensor | None

    @staticmethod
    def of(q: Tensor, k: Tensor, decay: Tensor, corrects: bool, write: Tensor | None, before: bool) -> _Chunk:
        total = decay.cumsum(1)
        reading = torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1]], 1) if before else total
        last, among = total[:, -1:], None
        if corrects:
            among = _between(k, k, total, total, -1)
            among = among if write is None else among * write[..., None]
            among = torch.eye(k.shape[1], dtype=k.dtype, device=k.device) + among
        return _Chunk(
            here=_between(q, k, reading, total, -int(before)),
            reads=q * _exp(reading),
            writes=k * _exp(last - total),
            keeps=_exp(last).transpose(1, 2),
            corrected=k * _exp(total) if corrects else None,
            among=among,
        )


def _chunks(decay: Tensor) -> list[slice]:
    size = _CHUNK if decay.shape[2] == 1 else _CHUNK_BY_CHANNEL
    return [slice(first, first + size) for first in range(0, decay.shape[1], size)]


def parts_of_heads(heads: int, positions: int, columns: int, keys: int, by_channel: bool, on_cpu: bool) -> list[slice]:
    """Return heads that are run over together, given the columns F of their values and the channels n of their keys.

    ``by_channel`` says that every channel of the state decays by itself.
    """
    each = scanned_numbers(positions, columns, keys, by_channel)
    size = max(1, (SCANNED if on_cpu else SCANNED_CUDA) // each)
    return [slice(first, min(first + size, heads)) for first in range(0, heads, size)]


def scanned_numbers(positions: int, columns: int, keys: int, by_channel: bool) -> int:
    """Return the numbers of a head's values or keys, or of what its queries meet within a chunk: whichever are more."""
    among = _CHUNK_BY_CHANNEL**2 * keys if by_channel else _CHUNK**2
    return max(positions * max(columns, keys), among)


def _at(write: Tensor | None, at: slice) -> Tensor | None:
    return None if write is None else write[:, at]


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
