"""The kernels of an adjoint sweep's crowds against the plain formulas in float64 (docs/adjoint.md, 2 to 5)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from depass_fast.kernels import crowd

from .checking import Check, error, poisoned, random


def _start(
    u: Tensor, part: Tensor, count: Tensor, act: Tensor, total: Tensor, rest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One start's shares (r, q, I) and log Z, share, mean (q, I), slope (q,), from gates ``u`` in units of T.

    ``part`` (r, q, I) says who takes part, ``count`` (q,) how many the crowd has.
    """
    number = count.clamp_min(1.0)[:, None]
    mean = (total - u[1:].sum(0)) / number
    spread, most = (u[0].square().mean(1, keepdim=True) / number).sqrt(), (2 * number.log()).sqrt()
    bounded = torch.minimum(spread, most)
    told = torch.maximum(spread, mean.abs().amax(1, keepdim=True) * 2**-11.5).clamp_min(1e-30)
    slope = torch.minimum(told, most).clamp_min(1e-30) / told
    own = mean + bounded * (spread - bounded / 2) + number.log()
    own = own.masked_fill((count <= 0)[:, None], -torch.inf)
    z = torch.cat([own[None], u[1:].masked_fill(~part[1:], -torch.inf)])
    log_z = torch.logsumexp(z, 0)
    nobody = log_z == -torch.inf
    shares = (z - log_z.masked_fill(nobody, 0.0)).exp()
    share = shares[0] / number
    shares[0] = u[0] * share * slope
    if rest < 0:
        share, mean = torch.where(nobody, 1.0 / number, share), mean.masked_fill(nobody, 0.0)
    else:
        shares[rest] = torch.where(nobody, 1.0, shares[rest])
    return shares * act, log_z.masked_fill(nobody, torch.inf), share, mean, slope[:, 0]


def _check_share(
    sizes: list[int], queries: int, n: int, rest: bool = True, bias: bool = False, temperature: float = 0.1,
    scale: float = 1.0, dead: bool = False, empty: bool = False,
) -> Callable:  # fmt: skip
    def run(dtype: torch.dtype, device: torch.device) -> float:
        starts, r, padding = len(sizes), sum(sizes), 2
        g = (random(0, r, queries, n) * 0.5 * scale).to(dtype)
        alive = torch.ones(r, queries, dtype=torch.uint8)
        if dead:
            alive[1::2, ::2] = 0
            g[1::2, ::2] = 0
        counts = torch.full((starts, queries), float(n))
        if empty:
            counts[::2] = 0.0  # everyone is explicit
        act, total = random(1, queries, n).to(dtype), (random(2, queries, n) * 20 * scale).to(dtype)
        constant = random(3, n) if bias else None
        if constant is not None:
            constant[::3] = 0.0
        first = torch.tensor([0, *sizes]).cumsum(0)
        places = [(1 if rest else -1), (1 + rest if bias else -1)]
        oracle = _oracle(g, alive, counts, first.tolist(), act, total, constant, places, temperature)
        wide = [poisoned(starts, queries + padding, n, dtype=torch.float32, device=device) for _ in range(3)]
        slope = poisoned(starts, queries + padding, dtype=torch.float32, device=device)
        tables = crowd.CrowdTables(*(table[:, 1 : 1 + queries] for table in (*wide, slope)))
        at = [torch.full((starts,), place, dtype=torch.int32, device=device) for place in places]
        rows = crowd.StartRows(first.to(device), rest=at[0], bias=at[1], longest=max(sizes))
        numbers = counts.to(device) if empty else counts[:, :1].to(device).expand(-1, queries)
        flags = torch.cat([alive, alive], 1).to(device)[:, :queries]  # rows that are not packed
        given, out = None if constant is None else constant.to(device), g.to(device)
        crowd.share_with_crowds(out, rows, flags, numbers, act.to(device), total.to(device), temperature, tables, given)
        assert all(bool(table[:, [0, queries + 1]].isnan().all()) for table in (*wide, slope)), (
            "written beside the tables"
        )
        found = (out, tables.log_z, tables.share, tables.mean, tables.slope)
        return max(error(*(x.nan_to_num(posinf=99.0) for x in pair)) for pair in zip(found, oracle, strict=True))

    return run


def _oracle(
    g: Tensor, alive: Tensor, counts: Tensor, first: list[int], act: Tensor, total: Tensor, constant: Tensor | None,
    places: list[int], temperature: float,
) -> list[Tensor]:  # fmt: skip
    """The shares of all rows and the tables of all starts, in float64."""
    found = []
    for s, (begin, end) in enumerate(itertools.pairwise(first)):
        values, part = g[begin:end].double(), (alive[begin:end] != 0)[..., None].expand(-1, -1, g.shape[2]).clone()
        if constant is not None:
            values[places[1]] += constant.double()
            part[places[1]] |= constant != 0
        numbers = counts[s].double(), act.double(), total.double() / temperature
        found.append(_start(values / temperature, part, *numbers, places[0]))
    shares, *tables = zip(*found, strict=True)
    return [torch.cat(shares), *map(torch.stack, tables)]


def _check_back(starts: int, targets: int, queries: int, n: int) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        y, act = (random(i, *shape, queries, n).to(dtype) for i, shape in enumerate([(starts, targets), ()]))
        share, mean, slope = (
            random(2, starts, queries, n).abs(),
            random(3, starts, queries, n),
            random(4, starts, queries),
        )
        gained = y.double() * (share * act).double()[:, None]
        before = random(5, starts + 1, targets, queries + 3)  # of more starts and positions
        oracle = (gained * (1.0 - slope.double()[..., None] * mean.double())[:, None]).sum(-1)
        oracle = before.double().index_put(
            (torch.arange(starts)[:, None, None], torch.arange(targets)[None, :, None], 2 + torch.arange(queries)),
            oracle,
            accumulate=True,
        )
        tables = crowd.CrowdTables(*(x.to(device) for x in (mean, share, mean, slope)))
        out, temperature = y.to(device), 0.1
        offsets = before.to(device)
        crowd.gradients_of_gates(out, act.to(device), temperature, tables, offsets[:starts, :, 2 : 2 + queries])
        gained *= slope.double()[:, None, :, None] / temperature
        return max(error(out, gained), error(offsets, oracle))

    return run


def crowd_checks(small: bool) -> Iterator[Check]:
    """Every corner; ``small``: sizes for the interpreter."""
    sizes, n = ([3, 5, 41, 3], 21) if small else ([3, 5, 141, 3], 1333)
    for case, options in {
        "rest": {},
        "no rest": {"rest": False},
        "bias": {"bias": True},
        "rows that are zero": {"dead": True, "bias": True},
        "nobody": {"dead": True, "empty": True},
        "nobody, no rest": {"dead": True, "empty": True, "rest": False},
        "cold": {"temperature": 0.01},
        "loud": {"scale": 10.0},  # exponents up to 200, and a crowd that is loud as a whole
        "quiet": {"scale": 1e-3},
    }.items():
        yield Check("crowd_share", case, _check_share(sizes, 3, n, **options))
        yield Check("crowd_share", f"{case}, few", _check_share([3, 2 + options.get("bias", 0), 4], 2, n, **options))
    yield Check("crowd_share", "two neurons", _check_share([2], 1, 2))
    yield Check("crowd_back", "targets", _check_back(3, 2, 5, n))
    yield Check("crowd_back", "one target, several blocks", _check_back(2, 1, 3, 1100))
