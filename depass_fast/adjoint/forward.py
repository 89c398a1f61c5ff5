"""The mean-field forward: what has to be carried explicitly so that log Z is known at every layer (docs/adjoint.md).

Explicit are `rest`, `bias` and the loud components, each as in an exact run. All others, the *crowd*, are known by
their sum, which is what the explicit ones lack to the hidden state, and by how far they scatter, which one component
with random signs shows. Start layers of one prompt are carried together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from ..runtime.transfer import to_device
from .maps import LayerMaps, LayerStack
from .memory import positions_at_once
from .starts import Start, all_alive

LEAST_TEMPERATURE = 1e-26  # the softmax is a maximum long before; g/T and its sums stay in float32's range


@dataclass(frozen=True)
class Settings:
    """How a sweep approximates. ``temperature`` None: the `taylor` rule, for which nothing is approximated.

    ``loud``: components whose expected g/T (:func:`loudness`) is above this are carried explicitly until it no longer
    is, the ``at_most`` loudest of every start layer. ``scatter``: whether the crowd's spread is estimated.
    """

    temperature: float | None
    loud: float = 2.0
    at_most: int = 128
    scatter: bool = True
    releases: bool = True
    seed: int = 0


@dataclass
class Step:
    """What the way back needs of one layer, for the S start layers under way there, the first S in order.

    A component of the crowd with gate g takes the share · (1 + slope · (g/T - mean)) of a neuron's activation.
    ``log_z``, ``share`` and ``mean`` are (S, Q, I), ``slope`` is (S, Q, 1). For `taylor` all four are None.
    """

    index: int
    queries: slice
    log_z: Tensor | None = None
    share: Tensor | None = None
    mean: Tensor | None = None
    slope: Tensor | None = None


@dataclass
class Forward:
    """The result of the mean-field forward.

    ``rows`` are the explicit ones at the end, at the read position: of start ``owner[r]``, component ``member[r]`` (or
    one of the three below). ``released`` are those that went back to the crowd, by the layer that they enter: rows
    (r, N, D), and owner and member in host memory. ``alive[s]`` lists the masks (M, Q) of start s at every layer,
    None: all are alive.
    """

    starts: list[Start]
    steps: list[Step]
    rows: _Rows
    released: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    alive: list[list[Tensor] | None] = field(default_factory=list)


REST_ROW, BIAS_ROW, PROBE_ROW = -1, -2, -3


def mean_field(
    road: LayerStack,
    starts: Sequence[Start],
    loud: Sequence[Tensor],
    settings: Settings,
    fixed: Sequence[Tensor] | None = None,
    budget: int = 1 << 28,
) -> Forward:
    """Carry the explicit rows of ``starts`` (in order) to the end of the road.

    ``loud`` holds the loud components of every start, (k,) indices: explicit until they are released. ``fixed`` holds
    others, no loud ones among them, that are explicit to the end. ``budget`` bounds the gates held at once, in bytes.
    """
    fixed = fixed or [indices[:0] for indices in loud]
    whole = [True] * len(starts) if settings.temperature is None else all_alive(starts)
    rows = _Rows(starts[0].bias.new_zeros(0, road.n, starts[0].bias.shape[1]))
    masks: list[Tensor | None] = []
    out = Forward(list(starts), [], rows)
    for index in range(starts[0].entering, road.end):
        maps = road.maps(index)
        queries = maps.queries
        rows.to(maps.device)
        joining = [s for s in range(len(starts)) if starts[s].entering == index]
        for s in joining:
            rows.join(s, starts[s], loud[s], fixed[s], settings)
            masks.append(None if whole[s] else starts[s].named.alive().T.to(rows.x))  # (M, N)
            out.alive.append(None if whole[s] else [])
        mid = bool(joining) and starts[joining[0]].mid
        read = rows.x[:, queries] if maps.parallel else None
        if mid:
            rows.x = rows.x[:, queries]
        else:
            rows.x = rows.x[:, queries] + maps.ov(rows.x)
            _add_constant(rows, maps, "attention")
        step = Step(index, queries)
        if settings.temperature is None:
            _allocate_taylor(rows, read, maps)
        else:
            counts = _crowd_counts(rows, starts, masks, out.alive, maps, mid)
            _allocate_softmax(rows, read, counts, maps, settings, step, budget)
        _add_constant(rows, maps, "mlp")
        out.steps.append(step)
        if index + 1 < road.end and settings.temperature is not None:
            _release(rows, road, index + 1, settings, out)
        road.passed.finish()
    rows.x = rows.x[:, -1:]
    for s, start in enumerate(starts):
        if start.entering >= road.end:  # nothing in between: what starts is what is read
            rows.to(start.bias.device)
            rows.join(s, start, loud[s][:0], loud[s][:0], settings)
            out.alive.append(None)
    return out


class _Rows:
    """The explicit rows, those of a start together: ``x`` (R, Q, D), ``owner`` and ``member`` (R,).

    ``stays`` (R,) says which are never released, ``sizes`` how many a start has. The first of a start's rows is its
    probe (not for `taylor`). All but ``x`` is in host memory, so that asking whose the rows are waits for no device.
    """

    def __init__(self, x: Tensor) -> None:
        self.x, self.sizes = x, []
        self.owner = self.member = torch.zeros(0, dtype=torch.long, device="cpu")
        self.stays = torch.zeros(0, dtype=torch.bool, device="cpu")
        self._places: dict[int, Tensor] = {}

    def to(self, device: torch.device) -> None:
        if self.x.device != device:
            self.x, self._places = self.x.to(device), {}

    def places(self, member: int) -> Tensor:
        """The rows of all starts that are `rest`, `bias` or the probe: indices (r,), in order, where the rows are."""
        if member not in self._places:
            self._places[member] = to_device((self.member == member).nonzero()[:, 0], self.x.device)
        return self._places[member]

    def join(self, s: int, start: Start, loud: Tensor, fixed: Tensor, settings: Settings) -> None:
        """Append the rows of start ``s``: its probe, `rest`, `bias`, the loud ones and those that stay to the end."""
        n_loud, loud = len(loud), torch.cat([loud, fixed])
        rows, members = [start.named.rows(to_device(loud, start.bias.device))], []
        if start.has_bias:
            rows, members = [start.bias[None], *rows], [BIAS_ROW]
        if start.rest is not None:
            rows, members = [start.rest[None], *rows], [REST_ROW, *members]
        if settings.temperature is not None:
            rows, members = [_probe(start, loud, settings)[None], *rows], [PROBE_ROW, *members]
        member = torch.cat([torch.tensor(members, dtype=torch.long, device="cpu"), loud])
        stays = torch.ones(len(member), dtype=torch.bool, device="cpu")
        stays[len(members) : len(members) + n_loud] = False
        new = torch.cat(rows)
        self.x = torch.cat([self.x, new[:, new.shape[1] - self.x.shape[1] :].to(self.x)])
        self.owner, self.member = torch.cat([self.owner, torch.full_like(member, s)]), torch.cat([self.member, member])
        self.stays, self._places = torch.cat([self.stays, stays]), {}
        self.sizes.append(len(member))

    def keep(self, kept: Tensor) -> None:
        """Drop the rows that are not ``kept`` (R,) bool."""
        self.x, self._places = self.x[to_device(kept.nonzero()[:, 0], self.x.device)], {}
        self.owner, self.member, self.stays = self.owner[kept], self.member[kept], self.stays[kept]
        self.sizes = self.owner.bincount(minlength=len(self.sizes)).tolist()

    def runs(self) -> list[tuple[int, int]]:
        """Neighbouring starts with equally many rows: how many starts, how many rows of each."""
        return [(len(list(same)), size) for size, same in groupby(self.sizes)]


def _probe(start: Start, loud: Tensor, settings: Settings) -> Tensor:
    """The crowd with random signs that sum to zero: Σ ε[m] · X[n, m], (N, D). Its square tells how far they scatter."""
    m = len(start.named)
    if not settings.scatter or len(loud) == m:
        return torch.zeros_like(start.bias)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + start.layer)
    signs = (torch.randint(0, 2, (m,), generator=generator, device="cpu") * 2 - 1).to(start.bias.dtype)
    signs[loud] = 0.0
    signs -= signs.sum() / (m - len(loud))
    signs[loud] = 0.0
    return start.named.sum(to_device(signs, start.bias.device))


def _crowd_counts(
    rows: _Rows,
    starts: Sequence[Start],
    masks: list[Tensor | None],
    alive: list[list[Tensor] | None],
    maps: LayerMaps,
    mid: bool,
) -> Tensor:
    """How many components of the crowd are not exactly zero, per start under way and position: (S, Q or 1, 1)."""
    extras = [1 + (start.rest is not None) + start.has_bias for start in starts[: len(masks)]]
    each = [len(start.named) - size + n for start, size, n in zip(starts, rows.sizes, extras, strict=False)]
    counts = to_device(torch.tensor(each, dtype=rows.x.dtype, device="cpu"), rows.x.device)[:, None]
    if any(mask is not None for mask in masks):
        counts = counts.expand(-1, maps.queries.stop - maps.queries.start).clone()
        seen = None if mid else maps.sees().T.to(rows.x.dtype)  # (N, Q)
        for s, mask in enumerate(masks):
            if mask is None:
                continue
            mask = mask.to(maps.device)
            masks[s] = mask[:, maps.queries] if mid else ((mask @ seen + mask[:, maps.queries]) > 0).to(mask)
            alive[s].append(masks[s] > 0)
            explicit = to_device(rows.member[(rows.owner == s) & (rows.member >= 0)], maps.device)
            counts[s] = masks[s].sum(0) - masks[s][explicit].sum(0)
    return counts[..., None]


def _add_constant(rows: _Rows, maps: LayerMaps, module: str) -> None:
    """The constants of "attention" or "mlp" for `bias`, and the stream's own norm behind them."""
    at = rows.places(BIAS_ROW)
    constant = maps.attention_constant if module == "attention" else maps.mlp_constant
    if constant is not None:
        rows.x[at] += constant
    rows.x, beta = maps.normed(rows.x, module), maps.stream_bias(module)
    if beta is not None:
        rows.x[at] += beta


def _allocate_taylor(rows: _Rows, read: Tensor | None, maps: LayerMaps) -> None:
    """Every row by itself: g / gate of the neuron's output."""
    rows.x = rows.x + maps.down(_gates(rows, read, maps) * taylor_factor(maps))


def taylor_factor(maps: LayerMaps) -> Tensor:
    """act / gate, zero where the gate is: (Q, I)."""
    total = maps.gate_total
    return torch.where(total == 0, 0.0, maps.act / torch.where(total == 0, 1.0, total))


def _gates(rows: _Rows, read: Tensor | None, maps: LayerMaps, at: slice = slice(None)) -> Tensor:
    """Gates (R, q, I) of the rows at some positions, or of what is ``read`` in their place (in a parallel layer)."""
    g = maps.gates((rows.x if read is None else read)[:, at], at)
    if maps.gate_constant is not None:
        g[rows.places(BIAS_ROW)] += maps.gate_constant
    return g


def _allocate_softmax(
    rows: _Rows,
    read: Tensor | None,
    counts: Tensor,
    maps: LayerMaps,
    settings: Settings,
    step: Step,
    budget: int,
) -> None:
    """Z from the explicit rows and the crowd's mean and scatter; then every row's share of it. Position by position."""
    (q, width), t = maps.act.shape, settings.temperature
    size = positions_at_once(budget, len(rows.x), width, rows.x.element_size())
    parts = []
    for first in range(0, q, size):
        at = slice(first, min(first + size, q))
        part = Step(step.index, step.queries)
        here = counts if counts.shape[1] == 1 else counts[:, at]
        # without a name, the gates are gone before the next ones are made
        rows.x[:, at] += maps.down(_shares(rows, _gates(rows, read, maps, at).div_(t), here, maps, t, part, at))
        parts.append(part)
    for name in ("log_z", "share", "mean", "slope"):
        tables = [getattr(part, name) for part in parts]
        setattr(step, name, tables[0] if len(tables) == 1 else torch.cat(tables, dim=1))


def _shares(rows: _Rows, u: Tensor, counts: Tensor, maps: LayerMaps, t: float, step: Step, at: slice) -> Tensor:
    """What every row takes, by its gates ``u`` (R, q, I) in units of T, of the activations ``at`` some positions.

    ``u`` is used up; the tables of the step are filled in. Nothing here waits for the device, whatever it finds.
    """
    runs = rows.runs()
    starts = [s for s, _ in runs]
    whole = u.split([s * size for s, size in runs])
    parts = [part.unflatten(0, run) for part, run in zip(whole, runs, strict=True)]  # (s, rows, q, I)
    probes, number = rows.places(PROBE_ROW), counts.clamp_min(1.0)
    probe = u[probes]  # (S, q, I)
    sums = torch.cat([part[:, 1] if part.shape[1] == 2 else part[:, 1:].sum(1) for part in parts])
    step.mean = torch.sub(maps.gate_total[at] / t, sums, out=sums).div_(number)
    loudest = probe.abs().amax(-1, keepdim=True).clamp_min_(1e-30)  # (S, q, 1); squares alone may overflow
    spread = (probe / loudest).square_().mean(-1, keepdim=True).div_(number).sqrt_().mul_(loudest)
    log_count = number.log()
    log_kappa, step.slope = _moment(spread, log_count, step.mean.abs().amax(-1, keepdim=True))
    # who drives a gate with exactly zero takes no part: a zero row; or anyone, of a dead neuron
    u.masked_fill_(u == 0, -torch.inf)
    lowest = torch.finfo(u.dtype).min
    u.index_copy_(0, probes, torch.full_like(probe, lowest).masked_fill_(probe == 0, -torch.inf))
    top = torch.cat([part.amax(1) for part in parts])
    none = (counts <= 0) | ((top == -torch.inf) & (step.mean == 0))
    # the crowd's part of Z takes the probe's place: Z is then a sum over a start's rows
    crowd = (step.mean + (log_kappa + log_count)).masked_fill_(none, -torch.inf)
    top = torch.maximum(top, crowd, out=top).clamp_min_(lowest)
    u.index_copy_(0, probes, crowd)
    for part, most in zip(parts, top[:, None].split(starts), strict=True):
        part.sub_(most)
    u.exp_()
    z = torch.cat([part.sum(1) for part in parts])
    nobody = z == 0
    step.log_z = z.log().add_(top).masked_fill_(nobody, torch.inf)
    z.masked_fill_(nobody, 1.0)
    step.share = (u[probes] / z).div_(number)
    probe.mul_(step.share).mul_(step.slope).mul_(maps.act[at])
    scale = torch.div(maps.act[at], z, out=z)
    for part, factor in zip(parts, scale[:, None].split(starts), strict=True):
        part.mul_(factor)
    u.index_copy_(0, probes, probe)
    _to_nobody(rows, u, nobody, number, maps.act[at], step)
    return u


def _to_nobody(rows: _Rows, taken: Tensor, nobody: Tensor, number: Tensor, act: Tensor, step: Step) -> None:
    """What nobody drives goes to `rest`; where there is none, evenly to the crowd."""
    rests = rows.places(REST_ROW)
    if len(rests) == len(nobody):
        taken.index_add_(0, rests, nobody * act)
        return
    owners = rows.owner[rows.member == REST_ROW]
    taken.index_add_(0, rests, nobody[to_device(owners, nobody.device)] * act)
    without = torch.ones(len(nobody), dtype=torch.bool, device="cpu")
    without[owners] = False
    even = (nobody & to_device(without, nobody.device)[:, None, None]).to(taken) / number
    step.share += even
    step.mean = torch.where(even > 0, 0.0, step.mean)


def _moment(spread: Tensor, log_count: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """log of the mean of e^(u - mean) over a normal crowd, and the slope of its linear regression over its mean.

    e^(σ²/2) and 1, until so few components hold the sum that their number counts (σ² > 2 log M): from there on the
    largest one does, at σ·sqrt(2 log M). That bounds what a step can amplify, whatever the gates; where they are
    enormous (``size``, in units of T), a spread that is next to their rounding does not count as none.
    """
    most = (2.0 * log_count).sqrt()
    bounded = torch.minimum(spread, most)
    told = torch.maximum(spread, size * torch.finfo(size.dtype).eps ** 0.5).clamp_min_(1e-30)
    return bounded * (spread - bounded / 2), torch.minimum(told, most).clamp_min_(1e-30) / told


def _release(rows: _Rows, road: LayerStack, index: int, settings: Settings, out: Forward) -> None:
    """Rows that are no longer loud at layer ``index`` go back to the crowd; their state is kept for the way back."""
    if not settings.releases or bool(rows.stays.all()):
        return
    weight, gate = road.drive(index, rows.x)
    size = (rows.x * weight).norm(dim=2).amax(1) * (gate / settings.temperature)
    quiet = ~rows.stays & (size < settings.loud).cpu()
    if not bool(quiet.any()):
        return
    x, owner = rows.x[to_device(quiet.nonzero()[:, 0], size.device)], rows.owner[quiet]
    out.released[index] = (x, owner, rows.member[quiet])
    if settings.scatter:
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
        signs = to_device(
            (torch.randint(0, 2, (len(x),), generator=generator, device="cpu") * 2 - 1).to(x.dtype), x.device
        )
        probes = rows.places(PROBE_ROW)[to_device(owner, x.device)]  # one per start, in order
        rows.x.index_add_(0, probes, x * signs[:, None, None])
    rows.keep(~quiet)
