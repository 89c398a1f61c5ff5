"""The kernel of the linear rules against the same arithmetic in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from depass_fast.kernels import linear

from .allocation_checks import chunk
from .checking import Check, error, poisoned, random


def _check_share_linearly(
    counts: list[int], n: int, ups: bool, zeros: bool = False, nan: bool = False, parts: bool = False
) -> Callable:
    """Check `share_linearly`. ``parts``: coefficients and ups are parts of longer rows; ``nan``: some gates are NaN."""

    def run(dtype: torch.dtype, device: torch.device) -> float:
        rows = sum(counts)
        g, u = ((random(seed, rows, n) * 0.7).to(dtype) for seed in (0, 1))
        tables = random(2, len(counts), n), random(3, len(counts), n)
        if zeros:
            g[::3], u[::3] = 0, 0  # components that are not there
            tables[0][:, n // 2] = 0  # neurons that write nothing by their gates
        if nan:
            g[::4, 1::3] = torch.nan
        at = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        oracle = g.double() * tables[0][at].double()
        if ups:
            oracle += u.double() * tables[1][at].double()
        _, starts, _ = chunk(counts, device)
        wide = poisoned(rows, n + 3, dtype=dtype, device=device)  # rows that are not packed
        out = wide[:, :n].copy_(g)
        given = [_part(x.to(device), parts) for x in (*tables, u)]
        linear.share_linearly(out, starts, max(counts), given[0], *((given[2], given[1]) if ups else ()))
        assert bool(wide[:, n:].isnan().all()), "written beside the gates"
        assert torch.equal(out.isnan().cpu(), oracle.isnan()), "NaN elsewhere"
        return error(out.nan_to_num(), oracle.nan_to_num())

    return run


def _part(x: Tensor, of_longer: bool) -> Tensor:
    return torch.cat([x, x], 1)[:, : x.shape[1]] if of_longer else x


def linear_checks(small: bool) -> Iterator[Check]:
    """Gates alone and with ups; ``small``: sizes for the interpreter."""
    counts = [3, 1, 9, 70, 2] if small else [3, 1, 9, 700, 64, 65, 2]
    n = 21 if small else 333
    for ups, name in ((False, "gates"), (True, "gates and ups")):
        yield Check("share_linearly", name, _check_share_linearly(counts, n, ups))
        yield Check("share_linearly", f"{name}, few", _check_share_linearly([3, 0, 1, 5], n, ups))
        yield Check("share_linearly", f"{name}, one", _check_share_linearly([1], 1, ups))
        corners = {"zeros": True, "nan": True, "parts": True}
        yield Check("share_linearly", f"{name}, corners", _check_share_linearly(counts, n, ups, **corners))
