"""The adjoint: one way back through the linearised layers yields every component's score (docs/adjoint.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.transfer import to_device
from .forward import Forward, Settings, taylor_factor
from .maps import LayerStack


def linear_scores(road: LayerStack, forward: Forward, directions: Tensor, settings: Settings) -> list[Tensor]:
    """First-order scores (K, M) of every start's named components, in ``directions`` (K, D) at the end of the road.

    The explicit components' are those of their own path: exact given log Z as far as they were carried.
    """
    starts, k, n = forward.starts, len(directions), road.n
    edges = torch.tensor([0, *(len(start.named) for start in starts)], device="cpu").cumsum(0)
    scores: list[Tensor] = [directions] * len(starts)
    offsets = _Offsets(forward, k, directions)
    own = [_at_the_end(forward, directions)]  # owner, member, score (r, K)
    back = directions[None, :, None].expand(len(starts), -1, -1, -1)  # (S, K, Q, D)
    for s, start in enumerate(starts):
        if start.entering >= road.end:
            scores[s] = start.named.project(_everywhere(back[s : s + 1], slice(n - 1, n), n)[0].to(start.bias))
    for step in reversed(forward.steps):
        maps = road.maps(step.index)
        active = sum(start.entering <= step.index for start in starts)
        back = back[:active].to(maps.device)
        back = maps.normed(back.flatten(0, 1), "mlp", transposed=True).unflatten(0, (active, k))
        y = maps.down_transposed(back.flatten(0, 1)).unflatten(0, (active, k))  # (S, K, Q, I)
        if settings.temperature is None:
            y *= taylor_factor(maps)
            read = maps.gates_transposed(y.flatten(0, 1)).view_as(back)
        else:  # a component receives share · act · (1 - slope · mean + slope · g / T)
            y *= (step.share * maps.act)[:, None]
            offsets.add(y.sum(-1) - step.slope[..., 0][:, None] * torch.einsum("skqi,sqi->skq", y, step.mean))
            read = maps.gates_transposed(y.flatten(0, 1)).view_as(back)
            read = read * (step.slope / settings.temperature)[:, None]
        if not maps.parallel:
            back = back + read
        if any(start.mid and start.entering == step.index for start in starts):
            back = _everywhere(back, step.queries, n)
        else:
            back = maps.normed(back.flatten(0, 1), "attention", transposed=True)
            through = maps.ov_transposed(back).unflatten(0, (active, k))
            back = back.unflatten(0, (active, k)) + (read if maps.parallel else 0.0)
            back = _everywhere(back, step.queries, n) + through
        if step.index in forward.released:
            x, owner, member = forward.released[step.index]
            seen = back[to_device(owner, back.device)]
            own.append((owner, member, torch.einsum("rnd,rknd->rk", x.to(seen), seen) + offsets.of_rows(owner, member)))
        for s, start in enumerate(starts):
            if start.entering == step.index:
                scores[s] = start.named.project(back[s].to(start.bias.device)) + offsets.of_start(s, start.bias.device)
        road.passed.finish()
    flat = torch.cat([part.to(directions.device) for part in scores], dim=1)
    for owner, member, score in own:
        named = (member >= 0).nonzero()[:, 0]
        at = to_device(edges[owner[named]] + member[named], flat.device)
        flat[:, at] = score[to_device(named, score.device)].T.to(flat)
    return list(flat.split([len(start.named) for start in starts], dim=1))


class _Offsets:
    """What components receive at the layers passed so far though their states were zero, where they are alive."""

    def __init__(self, forward: Forward, k: int, like: Tensor) -> None:
        self._alive = forward.alive
        self._total = like.new_zeros(len(forward.starts), k)  # where all are alive
        self._passed: dict[int, list[Tensor]] = {s: [] for s, masks in enumerate(forward.alive) if masks is not None}

    def add(self, beta: Tensor) -> None:
        """A layer's, per position: (S, K, Q)."""
        self._total = self._total.to(beta.device)
        self._total[: len(beta)] += beta.sum(2)
        for s in self._passed:
            if s < len(beta):
                self._passed[s].append(beta[s])

    def of_start(self, s: int, device: torch.device) -> Tensor:
        """Of all components of a start: (K, 1), or (K, M)."""
        return (self._masked(s) if s in self._passed else self._total[s][:, None]).to(device)

    def of_rows(self, owner: Tensor, member: Tensor) -> Tensor:
        """Of single components: (r, K)."""
        device = self._total.device
        found = self._total[to_device(owner, device)]
        for s in self._passed:
            at = (owner == s).nonzero()[:, 0]
            if len(at):
                found[to_device(at, device)] = self._masked(s)[:, to_device(member[at], device)].T
        return found

    def _masked(self, s: int) -> Tensor:
        if not self._passed[s]:
            return self._total[s][:, None].expand(-1, len(self._alive[s][0]))
        pairs = zip(self._passed[s], reversed(self._alive[s]), strict=False)  # the masks go from the first layer on
        return sum((beta @ mask.T.to(beta)).to(self._total.device) for beta, mask in pairs)


def extra_scores(forward: Forward, directions: Tensor, extra: int) -> Tensor:
    """Scores of `rest` or `bias` (as :mod:`forward` numbers them), zero where there is none: (starts, K)."""
    owner, member, score = _at_the_end(forward, directions)
    out = score.new_zeros(len(forward.starts), score.shape[1])
    at = (member == extra).nonzero()[:, 0]
    return out.index_add_(0, to_device(owner[at], out.device), score[to_device(at, out.device)])


def _at_the_end(forward: Forward, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Owner and member, in host memory, and score (R, K) of the rows that were explicit to the end."""
    rows = forward.rows
    return rows.owner, rows.member, rows.x[:, -1] @ directions.to(rows.x).T


def _everywhere(back: Tensor, queries: slice, n: int) -> Tensor:
    """Gradients at ``queries`` as gradients at all positions: (S, K, Q, D) -> (S, K, N, D)."""
    if back.shape[2] == n:
        return back
    out = back.new_zeros(*back.shape[:2], n, back.shape[3])
    out[:, :, queries] = back
    return out
