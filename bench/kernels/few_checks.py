"""The kernel of depass_fast.kernels.few against plain float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from depass_fast.kernels import few

from .checking import Check, error, random


def _check_few(rows: int, queries: int, keys: int, kv: int, groups: int, head_dim: int, transposed: bool) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        p = random(0, kv, groups, keys + 2, keys + 1).softmax(-1).to(dtype)[:, :, 1 : 1 + queries, :keys]  # strided
        heads, n = (kv * groups, queries) if transposed else (kv, keys)
        x = random(1, rows, n, heads * head_dim).to(dtype)
        if transposed:
            y = x.double().view(rows, n, kv, groups, head_dim)
            oracle = torch.einsum("hgqn,rqhgd->rnhd", p.double(), y)
        else:
            oracle = torch.einsum("hgqn,rnhd->rqhgd", p.double(), x.double().view(rows, n, kv, head_dim))
        out = few.apply_few(p.to(device) if device.type == "cpu" else _spread(p, device), x.to(device), transposed)
        return error(out, oracle.flatten(2))

    return run


def _spread(p: torch.Tensor, device: torch.device) -> torch.Tensor:
    """P on a device with the strides that it has here."""
    whole = torch.zeros(p.stride(0) * p.shape[0], dtype=p.dtype, device=device)
    return whole.as_strided(p.shape, p.stride()).copy_(p)


def few_checks(small: bool) -> Iterator[Check]:
    """Both ways, grouped heads and not, one query and several; ``small``: sizes for the interpreter."""
    rows, head_dim = (19, 12) if small else (301, 120)
    for transposed in (False, True):
        way = "back" if transposed else "there"
        yield Check("apply_few", f"{way}, heads of their own", _check_few(rows, 7, 7, 3, 1, head_dim, transposed))
        yield Check("apply_few", f"{way}, groups", _check_few(rows, 20, 20, 2, 3, head_dim, transposed))
        yield Check("apply_few", f"{way}, one query", _check_few(5, 1, 33, 2, 2, head_dim, transposed))
        most = _check_few(2, few.MOST, few.MOST, 1, 2, 16 if small else 4 * few.MOST, transposed)
        yield Check("apply_few", f"{way}, most positions", most)
