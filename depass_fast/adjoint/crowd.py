"""The softmax rule of a layer for explicit rows and the crowd: the living, log Z, shares (docs/adjoint.md, 2 and 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.transfer import to_device
from .maps import LayerMaps
from .memory import positions_at_once
from .rows import BIAS_ROW, PROBE_ROW, REST_ROW, ExplicitRows
from .starts import Start


@dataclass
class Crowd:
    """The effect of a layer on the crowds of the S start layers under way there, the first S in order.

    A component of the crowd with gate g takes the share · (1 + slope · (g/T - mean)) of a neuron's activation.
    ``log_z``, ``share`` and ``mean`` are (S, Q, I), ``slope`` is (S, Q, 1). ``exact``: log Z is that of all components,
    each with its own term.
    """

    log_z: Tensor
    share: Tensor
    mean: Tensor
    slope: Tensor
    exact: bool = False

    @staticmethod
    def joined(parts: Sequence[Crowd]) -> Crowd:
        """Return the crowds at some positions after one another as those at all of them."""
        if len(parts) == 1:
            return parts[0]
        return Crowd(
            log_z=torch.cat([part.log_z for part in parts], dim=1),
            share=torch.cat([part.share for part in parts], dim=1),
            mean=torch.cat([part.mean for part in parts], dim=1),
            slope=torch.cat([part.slope for part in parts], dim=1),
        )


class Alive:
    """The named components that are not exactly zero, for every start under way.

    ``passed[s]`` lists the masks (M, Q) of start s, bool, at every layer so far; None: all are alive everywhere.
    """

    def __init__(self) -> None:
        self.passed: list[list[Tensor] | None] = []
        self._masks: list[Tensor | None] = []  # (M, N), of the state that enters a layer

    def join(self, start: Start, whole: bool, like: Tensor) -> None:
        """Begin with the next start; ``whole``: none of its components is zero anywhere."""
        self._masks.append(None if whole else (start.named.alive() != 0).T.to(like))
        self.passed.append(None if whole else [])

    def crowd_counts(self, rows: ExplicitRows, maps: LayerMaps, mid: bool) -> Tensor:
        """Return how many components of the crowd are alive at a layer's MLP: (S, Q or 1, 1).

        ``mid``: the components enter behind the layer's attention.
        """
        counts = rows.crowds()[:, None]
        if all(mask is None for mask in self._masks):
            return counts[..., None]
        counts = counts.expand(-1, maps.queries.stop - maps.queries.start).clone()
        seen = None if mid else maps.sees().T.to(rows.x.dtype)  # (N, Q)
        for s, (mask, passed) in enumerate(zip(self._masks, self.passed, strict=True)):
            if mask is None or passed is None:
                continue
            mask = mask.to(maps.device)
            here = mask[:, maps.queries]
            mask = here if seen is None else ((mask @ seen + here) > 0).to(mask)
            self._masks[s] = mask
            passed.append(mask > 0)
            counts[s] = mask.sum(0) - mask[to_device(rows.named_of(s), maps.device)].sum(0)
        return counts[..., None]


def _gates_of(rows: ExplicitRows, read: Tensor | None, maps: LayerMaps, at: slice = slice(None)) -> Tensor:
    """Return the gates (R, q, I) of the rows at some positions; a parallel layer reads ``read`` in their place."""
    g = maps.gates((rows.x if read is None else read)[:, at], at)
    rows.add_to_bias(g, maps.gate_constant)
    return g


def allocate_softmax(
    rows: ExplicitRows, read: Tensor | None, counts: Tensor, maps: LayerMaps, temperature: float, budget: int
) -> Crowd:
    """Add to every row its share of the activations, and return what the layer does to the crowds.

    ``counts`` are the crowds' components, (S, Q or 1, 1); ``budget`` bounds the gates held at once, in bytes.
    """
    if maps.fused:
        return _allocate_fused(rows, read, counts, maps, temperature, budget)
    queries, width = maps.act.shape
    size = positions_at_once(budget, len(rows.x), width, rows.x.element_size())
    parts = []
    for first in range(0, queries, size):
        at = slice(first, min(first + size, queries))
        here = counts if counts.shape[1] == 1 else counts[:, at]
        parts.append(_allocate_at(rows, read, here, maps, temperature, at))
    return Crowd.joined(parts)


def _allocate_fused(
    rows: ExplicitRows, read: Tensor | None, counts: Tensor, maps: LayerMaps, temperature: float, budget: int
) -> Crowd:
    """Do :func:`allocate_softmax` with kernels."""
    from .fused import FusedMaps, StartRows  # need Triton

    assert isinstance(maps, FusedMaps)
    places = StartRows(*rows.tables(), longest=max(rows.sizes))
    rows.x, tables = maps.allocate(rows.x, rows.x if read is None else read, places, counts, temperature, budget)
    return Crowd(tables.log_z, tables.share, tables.mean, tables.slope[..., None])


def _allocate_at(
    rows: ExplicitRows, read: Tensor | None, counts: Tensor, maps: LayerMaps, temperature: float, at: slice
) -> Crowd:
    """Do :func:`allocate_softmax` at some positions. The gates are gone when it returns, before the next are made."""
    u = _gates_of(rows, read, maps, at).div_(temperature)
    dead = dead_rows((rows.x if read is None else read)[:, at])
    taken, crowd = _shares(rows, u, dead, counts, maps, temperature, at)
    rows.x[:, at] += maps.down(taken)
    return crowd


def _shares(
    rows: ExplicitRows, u: Tensor, dead: Tensor, counts: Tensor, maps: LayerMaps, temperature: float, at: slice
) -> tuple[Tensor, Crowd]:
    """Return what every row takes of the activations at some positions, (R, q, I), and the crowds there.

    ``u`` (R, q, I) are the rows' gates in units of T; it is used up. ``dead`` (R, q) says which rows are zero. Nothing
    here waits for the device.
    """
    act, probes, number = maps.act[at], rows.places(PROBE_ROW), counts.clamp_min(1.0)
    parts = rows.by_start(u)
    probe = u[probes]  # (S, q, I)
    mean = _crowd_mean(parts, maps.gate_total[at] / temperature, number)
    log_sum, slope = _crowd_moments(probe, mean, number)
    _shut_out(rows, u, dead, maps.gate_constant)
    # the crowd's part of Z takes the probe's place: Z is then a sum over a start's rows
    u.index_copy_(0, probes, (mean + log_sum).masked_fill_(counts <= 0, -torch.inf))
    top = torch.cat([part.amax(1) for part in parts]).clamp_min_(torch.finfo(u.dtype).min)
    z, log_z, nobody = _normalise(u, parts, top)
    share = (u[probes] / z).div_(number)
    probe.mul_(share).mul_(slope).mul_(act)
    scale = torch.div(act, z, out=z)
    for part, factor in zip(parts, scale[:, None].split([len(part) for part in parts]), strict=True):
        part.mul_(factor)
    u.index_copy_(0, probes, probe)
    crowd = Crowd(log_z, share, mean, slope)
    _give_to_rest(rows, u, nobody, number, act, crowd)
    return u, crowd


def dead_rows(x: Tensor) -> Tensor:
    """Return which rows (..., D) are exactly zero."""
    return torch.linalg.vector_norm(x, torch.inf, dim=-1) == 0


def _shut_out(rows: ExplicitRows, u: Tensor, dead: Tensor, constant: Tensor | None) -> None:
    """Set the gates ``u`` (R, q, I) of dead rows to -inf, but for those of `bias` that a ``constant`` (I,) drives."""
    dead, at = dead[..., None], rows.places(BIAS_ROW)
    driven = None if constant is None else u[at].masked_fill_(dead[at] & (constant == 0), -torch.inf)
    u.masked_fill_(dead, -torch.inf)
    if driven is not None:
        u.index_copy_(0, at, driven)


def _crowd_mean(parts: Sequence[Tensor], total: Tensor, number: Tensor) -> Tensor:
    """Return the mean gate of each crowd, (S, q, I): what explicit rows lack to the ``total`` gate, per component."""
    sums = torch.cat([part[:, 1] if part.shape[1] == 2 else part[:, 1:].sum(1) for part in parts])
    return torch.sub(total, sums, out=sums).div_(number)


def _crowd_moments(probe: Tensor, mean: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Return log Σ e^(u - mean) over each crowd, and the slope of a component's e^(u - mean) around it: (S, q, 1)."""
    loudest = probe.abs().amax(-1, keepdim=True).clamp_min_(1e-30)  # squares alone may overflow
    spread = (probe / loudest).square_().mean(-1, keepdim=True).div_(number).sqrt_().mul_(loudest)
    log_count = number.log()
    log_kappa, slope = _moment(spread, log_count, mean.abs().amax(-1, keepdim=True))
    return log_kappa + log_count, slope


def _normalise(u: Tensor, parts: Sequence[Tensor], top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace ``u`` by e^(u - top), and return its sum Z over each start's rows, log Z, and where nobody takes part.

    ``parts`` are the views of ``u`` by start. Z is 1 and log Z infinite where nobody takes part: all three (S, q, I).
    """
    for part, most in zip(parts, top[:, None].split([len(part) for part in parts]), strict=True):
        part.sub_(most)
    u.exp_()
    z = torch.cat([part.sum(1) for part in parts])
    nobody = z == 0
    log_z = z.log().add_(top).masked_fill_(nobody, torch.inf)
    return z.masked_fill_(nobody, 1.0), log_z, nobody


def _give_to_rest(rows: ExplicitRows, taken: Tensor, nobody: Tensor, number: Tensor, act: Tensor, crowd: Crowd) -> None:
    """Give to `rest` what nobody drives; where there is no `rest`, to the crowd, evenly."""
    rests = rows.places(REST_ROW)
    if len(rests) == len(nobody):
        taken.index_add_(0, rests, nobody * act)
        return
    owners = rows.owner[rows.member == REST_ROW]
    taken.index_add_(0, rests, nobody[to_device(owners, nobody.device)] * act)
    without = torch.ones(len(nobody), dtype=torch.bool, device="cpu")
    without[owners] = False
    even = (nobody & to_device(without, nobody.device)[:, None, None]).to(taken) / number
    crowd.share += even
    crowd.mean = torch.where(even > 0, 0.0, crowd.mean)


def _moment(spread: Tensor, log_count: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return log of the mean of e^(u - mean) over a normal crowd, and the slope of its linear regression over its mean.

    These are e^(σ²/2) and 1, until so few components hold the sum that their number counts (σ² > 2 log M): from there
    on the largest one does, at σ·sqrt(2 log M). That bounds what a step can amplify, whatever the gates. Where they are
    enormous (``size``, in units of T), a spread that is next to their rounding does not count as none.
    """
    most = (2.0 * log_count).sqrt()
    bounded = torch.minimum(spread, most)
    told = torch.maximum(spread, size * torch.finfo(size.dtype).eps ** 0.5).clamp_min_(1e-30)
    return bounded * (spread - bounded / 2), torch.minimum(told, most).clamp_min_(1e-30) / told
