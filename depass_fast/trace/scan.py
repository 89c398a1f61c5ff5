"""A frozen recurrence applied to values, or its transpose to gradients: chunk by chunk or step by step, linear in them.

Every exponent is a sum of logarithms of decays between two positions, at most zero: nothing overflows, however long the
prompt is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_GONE = -40.0  # the logarithm below which a decay is zero: its products would be denormal numbers, which are slow
CHUNK = 64  # positions at a time where a head's state decays as one
SCANNED, SCANNED_CUDA = 1 << 20, 1 << 26  # numbers of heads' chunks, or of their states, that are held at once
SCANS = 6  # times that so many are: keys, queries, decays, values, what is given, maps
_CHUNK_BY_CHANNEL = 16  # where every channel of it decays by itself
CHANNELS, _NARROW = 256, 16  # from so many heads on they are channels, of which a CPU takes so few columns step by step


class Steps(NamedTuple):
    """A recurrence's numbers at N positions: q, k (H, N, n), decay (H, N, 1 | n) and write (H, N).

    It reads by q and writes by k. ``decay`` holds logarithms, at most zero. ``write`` None: one.
    """

    q: Tensor
    k: Tensor
    decay: Tensor
    write: Tensor | None

    def at(self, positions: slice) -> Steps:
        """Return those of some positions."""
        write = None if self.write is None else self.write[:, positions]
        return Steps(self.q[:, positions], self.k[:, positions], self.decay[:, positions], write)


def scan(
    steps: Callable[[slice], Steps],
    corrects: bool,
    x: Tensor,
    nothing: float = 0.0,
    before: bool = False,
    own: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Apply a recurrence to values: x (H, N, F) -> (H, N, F).

    Args:
        steps: Makes the steps of a chunk of positions, in the dtype that is computed in.
        corrects: True for the delta rule (DESIGN.md section 10).
        before: True if a head reads the state in front of its own position's decay and write.
        nothing: What is smaller becomes zero on its way, as products of it would be denormal numbers, which are slow.
        own: (H, N, 1) or (H, 1, 1), what a head gives of a value at its own position beside the state.
        out: Where the result goes.
    """
    out, state = torch.empty_like(x) if out is None else out, None
    if _goes_step_by_step(x, corrects, nothing):
        return _step_by_step(steps, x, before, own, out)
    for at in _chunks(steps, x):
        given = steps(at)
        chunk, value = _Chunk.of(given, corrects, before), x[:, at].to(given.q.dtype)
        if state is None:
            state = value.new_zeros(x.shape[0], given.k.shape[2], x.shape[2])
        xc = value
        if chunk.corrected is not None:
            xc = xc - chunk.corrected @ state
        if given.write is not None:
            xc = xc * given.write[..., None]
        if chunk.among is not None:
            xc = torch.linalg.solve_triangular(chunk.among, xc, upper=False, unitriangular=True)
        xc = _cut(xc, nothing)
        out[:, at] = _cut(_with_own(chunk.here @ xc + chunk.reads @ state, own, at, value), nothing)
        state = _cut(chunk.keeps * state + chunk.writes.transpose(1, 2) @ xc, nothing)
    return out


def scan_back(
    steps: Callable[[slice], Steps],
    corrects: bool,
    y: Tensor,
    nothing: float = 0.0,
    before: bool = False,
    own: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Apply the transpose of :func:`scan` to gradients of what heads give: y (H, N, F) -> (H, N, F).

    The chunks are taken from the last to the first, and the gradient of the state goes from one to the one before. No
    more than a chunk is held. Arguments are as of :func:`scan`.
    """
    out, state = torch.empty_like(y) if out is None else out, None
    if _goes_step_by_step(y, corrects, nothing):
        return _step_by_step_back(steps, y, before, own, out)
    for at in reversed(_chunks(steps, y)):
        given = steps(at)
        chunk, yc = _Chunk.of(given, corrects, before), y[:, at].to(given.q.dtype)
        if state is None:
            state = yc.new_zeros(y.shape[0], given.k.shape[2], y.shape[2])
        xc = _cut(chunk.here.transpose(1, 2) @ yc + chunk.writes @ state, nothing)
        state = chunk.keeps * state + chunk.reads.transpose(1, 2) @ yc
        if chunk.among is not None:
            xc = torch.linalg.solve_triangular(chunk.among.transpose(1, 2), xc, upper=True, unitriangular=True)
        if given.write is not None:
            xc = xc * given.write[..., None]
        if chunk.corrected is not None:
            state = state - chunk.corrected.transpose(1, 2) @ xc
        out[:, at], state = _with_own(xc, own, at, yc), _cut(state, nothing)
    return out


def _goes_step_by_step(x: Tensor, corrects: bool, nothing: float) -> bool:
    return are_channels(len(x), x.shape[2], x.device.type == "cpu") and not (corrects or nothing)


def are_channels(heads: int, columns: int, on_cpu: bool) -> bool:
    """True if a chunk's maps would cost more than all that they are applied to: channels of few columns, on a CPU."""
    return heads >= CHANNELS and columns <= _NARROW and on_cpu


def _step_by_step(steps: Callable[[slice], Steps], x: Tensor, before: bool, own: Tensor | None, out: Tensor) -> Tensor:
    """Do what :func:`scan` does, one position after the other."""
    state = None
    for at in _slices(x.shape[1], _CHUNK_BY_CHANNEL):
        given = steps(at)
        q, k, keeps = _by_position(given)
        value = x[:, at].to(q.dtype)
        written = (value if given.write is None else value * given.write[..., None]).transpose(0, 1).contiguous()
        state = torch.zeros_like(written[0, ..., None] * k[0]) if state is None else state  # (H, F, n)
        read = torch.empty_like(written)
        for t in range(len(read)):
            if before:
                torch.sum(state * q[t], -1, out=read[t])
            state.mul_(keeps[t]).addcmul_(written[t, ..., None], k[t])
            if not before:
                torch.sum(state * q[t], -1, out=read[t])
        out[:, at] = _with_own(read.transpose(0, 1), own, at, value)
        state = _without_traces(state)
    return out


def _step_by_step_back(
    steps: Callable[[slice], Steps], y: Tensor, before: bool, own: Tensor | None, out: Tensor
) -> Tensor:
    """Do what :func:`scan_back` does, one position after the other."""
    state = None
    for at in reversed(_slices(y.shape[1], _CHUNK_BY_CHANNEL)):
        given = steps(at)
        q, k, keeps = _by_position(given)
        value = y[:, at].to(q.dtype)
        arriving = value.transpose(0, 1).contiguous()
        state = torch.zeros_like(arriving[0, ..., None] * q[0]) if state is None else state
        found = torch.empty_like(arriving)
        for t in reversed(range(len(found))):
            if not before:
                state.addcmul_(arriving[t, ..., None], q[t])
            torch.sum(state * k[t], -1, out=found[t])
            state.mul_(keeps[t])
            if before:
                state.addcmul_(arriving[t, ..., None], q[t])
        found = found.transpose(0, 1)
        found = found if given.write is None else found * given.write[..., None]
        out[:, at] = _with_own(found, own, at, value)
        state = _without_traces(state)
    return out


def _without_traces(state: Tensor) -> Tensor:
    """Return a state without what has nearly decayed: it would be denormal numbers, which are slow, for many steps."""
    return _cut(state, torch.finfo(state.dtype).tiny ** 0.8)


def _by_position(given: Steps) -> tuple[Tensor, ...]:
    """Return what C positions read by, what they write by, and what they keep of the state: (C, H, 1, 1 | n)."""
    every = given.q, given.k, _exp(given.decay)
    return tuple(one.transpose(0, 1).contiguous()[:, :, None] for one in every)


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
    def of(steps: Steps, corrects: bool, before: bool) -> _Chunk:
        q, k, total, write = steps.q, steps.k, steps.decay.cumsum(1), steps.write
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


def _chunks(steps: Callable[[slice], Steps], x: Tensor) -> list[slice]:
    size = CHUNK if steps(slice(0, 1)).decay.shape[2] == 1 else _CHUNK_BY_CHANNEL
    return _slices(x.shape[1], size)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def parts_of_heads(heads: int, columns: int, keys: int, by_channel: bool, on_cpu: bool) -> list[slice]:
    """Return heads that are run over together, given the columns F of their values and the channels n of their keys.

    ``by_channel`` says that every channel of the state decays by itself.
    """
    channels = are_channels(heads, columns, on_cpu)
    size = (SCANNED if on_cpu else SCANNED_CUDA) // scanned_numbers(columns, keys, by_channel or channels)
    parts = _slices(heads, max(1, size, CHANNELS if channels else 1))
    if channels and len(parts) > 1 and heads - parts[-1].start < CHANNELS:  # all of them go step by step
        parts[-2:] = [slice(parts[-2].start, heads)]
    return parts


def scanned_numbers(columns: int, keys: int, by_channel: bool) -> int:
    """Return how many numbers a head's chunk or its state takes, whichever is larger."""
    chunk = _CHUNK_BY_CHANNEL if by_channel else CHUNK
    return max(chunk * max(chunk, columns, keys), keys * columns)


def _with_own(given: Tensor, own: Tensor | None, at: slice, x: Tensor) -> Tensor:
    if own is None:
        return given
    return given.addcmul(own[:, at] if own.shape[1] > 1 else own, x)


def _between(q: Tensor, k: Tensor, reading: Tensor, total: Tensor, diagonal: int) -> Tensor:
    """Return what queries meet of keys that came before, as far as these have not decayed: (H, C, C)."""
    if total.shape[2] > 1:
        return _between_by_channel(q, k, reading, total, diagonal)
    c = q.shape[1]
    seen = torch.ones(c, c, dtype=torch.bool, device=q.device).tril(diagonal)
    apart = (reading - total.transpose(1, 2)).masked_fill(~seen, -torch.inf)  # (H, C, C)
    return (q @ k.transpose(1, 2)) * _exp(apart)


def _between_by_channel(q: Tensor, k: Tensor, reading: Tensor, total: Tensor, diagonal: int) -> Tensor:
    """Return the same where every channel decays by itself.

    C positions are halved, and their halves again. A query in the second half meets a key in the first by way of the
    edge between them: the decay from the edge to the query, times that from the key to the edge. Both are at most one,
    and each belongs to one position, so that their products make up a product of matrices.
    """
    c = q.shape[1]
    size = 1 << (c - 1).bit_length()
    if size > c:  # the last position again, to be cut off
        at = torch.arange(size, device=q.device).clamp(max=c - 1)
        q, k, reading, total = (x[:, at] for x in (q, k, reading, total))
    out, half = q.new_zeros(len(q), size, size), size // 2
    while half:
        (_, late), (early, _), (_, upto), (since, _) = (
            x.unflatten(1, (-1, 2, half)).unbind(2) for x in (q, k, reading, total)
        )
        edge = since[:, :, -1:]  # (H, pairs of halves, 1, n)
        met = (late * _exp(upto - edge)) @ (early * _exp(edge - since)).transpose(2, 3)
        pairs = out.view(len(q), -1, 2, half, size // (2 * half), 2, half)[:, :, 1, :, :, 0]
        pairs.diagonal(dim1=1, dim2=3).copy_(met.permute(0, 2, 3, 1))
        half //= 2
    if diagonal == 0:
        out.diagonal(dim1=1, dim2=2).copy_((q * k).sum(2))
    return out[:, :c, :c]


def _cut(x: Tensor, nothing: float) -> Tensor:
    return x.masked_fill(x.abs() < nothing, 0.0) if nothing else x


def _exp(logarithm: Tensor) -> Tensor:
    return torch.threshold(logarithm, _GONE, -torch.inf).exp_()
