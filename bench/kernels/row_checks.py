"""The kernels of depass_fast.kernels.rows against plain float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from depass_fast.backends.triton.pieces import make_piece
from depass_fast.kernels import rows

from .checking import Check, error, piece_rows, poisoned, random, tokens


def _check_read_rows(width: int, centred: bool, gather: bool, scaled: bool = False) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        layout = tokens([5, 1, 7])
        x, weight = random(0, layout.n_rows, width), random(1, width)
        if scaled:
            x *= (12 * random(3, layout.n_rows)).exp2()[:, None]
        x[3] = 0
        part = (range(0, 1), 1, 4) if gather else (range(0, 3), 0, None)
        piece = make_piece(layout, *part, 16, 1, device)
        scale = random(2, len(layout.counts)).abs() + 0.5
        source = piece_rows(layout, *part)
        segment = torch.from_numpy(layout.row_segments())[source]
        oracle = x.double()[source]
        dead = (oracle == 0).all(1)
        oracle = oracle - oracle.mean(1, keepdim=True) if centred else oracle
        oracle = oracle * scale[segment, None] * weight
        out = poisoned(len(source), width, dtype=dtype, device=device)
        alive = poisoned(len(source), dtype=torch.uint8, device=device)
        own = poisoned(len(source), dtype=torch.float32, device=device) if scaled else None
        of_rows = scale.to(device)[piece.positions]
        rows.read_rows(x.to(device), piece.rows, of_rows, weight.to(device), centred, out, alive, own)
        wrong = (alive.cpu() == 0) != dead
        if own is None:
            return error(out, oracle) + float(wrong.any())
        largest = out.float().abs().amax(1).cpu()[~dead]
        if (own.frexp().mantissa != 0.5).any() or (largest < 2**rows.ROW_TOP).any():
            return float("inf")
        each = oracle.norm(dim=1, keepdim=True).clamp_min(1e-30)  # every row is as precise as any other
        return error(out.double().cpu() * own.double().cpu()[:, None] / each, oracle / each) + float(wrong.any())

    return run


def _check_row_scales(width: int, centred: bool, picked: bool) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        x = (3 + random(0, 9, width)).to(dtype)
        at = torch.tensor([8, 0, 0, 5]) if picked else None
        oracle = x.double() if at is None else x[at].double()
        oracle = oracle - oracle.mean(1, keepdim=True) if centred else oracle
        oracle = torch.rsqrt(oracle.square().mean(1) + 1e-5)
        return error(rows.row_scales(x.to(device), None if at is None else at.to(device), 1e-5, centred), oracle)

    return run


def _check_add_rows(width: int, gather: bool, scaled: bool) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        layout = tokens([5, 1, 7])
        part = (range(2, 3), 2, 6) if gather else (range(1, 3), 0, None)
        piece, source = make_piece(layout, *part, 16, 1, device), piece_rows(layout, *part)
        x, gained = random(0, layout.n_rows, width), random(1, len(source), width).to(dtype)
        own = random(2, len(source)) if scaled else None
        more = gained.double() if own is None else gained.double() * own[:, None]
        oracle = x.double().index_add(0, source, more)
        out = x.to(device)
        rows.add_rows(out, piece.rows, gained.to(device), None if own is None else own.to(device))
        return error(out, oracle)

    return run


def _check_read_out(n: int, width: int, k: int) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        x, directions, scale = random(0, n, width).to(dtype), random(1, k, width), random(2, 3)
        segment = torch.arange(n) % 3
        oracle = x.double() @ directions.double().T * scale.double()[segment, None]
        out = rows.read_out(x.to(device), directions.to(device), segment.int().to(device), scale.to(device))
        return error(out, oracle)

    return run


def _check_add_norm_back(width: int, centred: bool, scaled: bool, narrow: bool, positions: int = 5) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        n = 3 * positions
        x, y, weight = random(0, n, width), random(1, n, width).to(dtype), random(2, width).to(dtype)
        scale = random(3, positions).abs() + 0.5 if scaled else None
        gained = y.double() * weight.double()
        if scale is not None:
            gained *= scale.double().repeat(3)[:, None]
        gained -= gained.mean(1, keepdim=True) if centred else 0.0
        oracle = x.double() + gained
        out, copied = x.to(device), poisoned(n, width, dtype=dtype, device=device) if narrow else None
        given = None if scale is None else scale.to(device)
        rows.add_norm_back(out, y.to(device), given, weight.to(device), centred, copied)
        if copied is not None and not torch.equal(copied, out.to(dtype)):
            return float("inf")
        return error(out, oracle)

    return run


def row_checks(small: bool) -> Iterator[Check]:
    """Every kernel of rows; ``small``: sizes for the interpreter."""
    wide = 40 if small else 1000
    yield Check("read_rows", "scaled", _check_read_rows(wide + 7, False, False))
    yield Check("read_rows", "centred", _check_read_rows(wide + 7, True, False))
    yield Check("read_rows", "gathered", _check_read_rows(wide + 7, False, True))
    for centred, picked in ((False, False), (True, False), (False, True)):
        case = f"{'centred' if centred else 'plain'}, {'picked' if picked else 'all'}"
        yield Check("row_scales", case, _check_row_scales(wide + 7, centred, picked))
    yield Check("read_rows", "with scales of their own", _check_read_rows(wide + 7, False, True, scaled=True))
    for gather, scaled in ((True, False), (True, True), (False, True)):
        case = f"{'gathered' if gather else 'neighbours'}{', scaled' if scaled else ''}"
        yield Check("add_rows", case, _check_add_rows(wide + 7, gather, scaled))
    for centred, scaled, narrow in ((False, True, True), (True, True, True), (True, False, False)):
        case = (
            f"{'centred' if centred else 'plain'}, {'scaled' if scaled else 'alone'}, {'copied' if narrow else 'wide'}"
        )
        yield Check("add_norm_back", case, _check_add_norm_back(wide + 7, centred, scaled, narrow))
    yield Check("add_norm_back", "one position", _check_add_norm_back(wide, False, True, True, positions=1))
    for n, k in ((1, 1), (21, 1), (21, 19)):
        yield Check("read_out", f"{n} rows, {k} directions", _check_read_out(n, wide + 7, k))
