"""The adjoint: one way back through the linearised layers yields every component's score (docs/adjoint.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .forward import Forward, Settings, taylor_factor
from .maps import Road


def linear_scores(road: Road, forward: Forward, directions: Tensor, settings: Settings) -> list[Tensor]:
    """First-order scores (K, M) of every start's named components, in ``directions`` (K, D) at the end of the road.

    The explicit components' are those of their own path: exact given log Z as far as they were carried.
    """
    starts, k, n = forward.starts, len(directions), road.n
    scores: list[Tensor] = [directions] * len(starts)
    offsets: list[list[Tensor]] = [[] for _ in starts]  # (K, Q) per layer, from the last one on
    own: list[tuple[Tensor, Tensor, Tensor]] = [_at_the_end(forward, directions)]  # owner, member, score (r, K)
    back = directions.new_zeros(len(starts), k, 1, directions.shape[1])
    back += directions[None, :, None]
    if not forward.steps:
        back = _everywhere(back, slice(n - 1, n), n)
    for s, start in enumerate(starts):
        if start.entering >= road.end:
            last = _everywhere(back[s : s + 1, :, -1:], slice(n - 1, n), n)[0]
            scores[s] = start.named.project(last.to(start.bias))
    for step in reversed(forward.steps):
        maps = road.maps(step.index)
        active = sum(start.entering <= step.index for start in starts)
        back = back[:active].to(maps.device)  # (S, K, Q, D)
        y = maps.down_transposed(back.flatten(0, 1)).unflatten(0, (active, k))  # (S, K, Q, I)
        if settings.temperature is None:
            y *= taylor_factor(maps)
            back = back + maps.gates_transposed(y.flatten(0, 1)).view_as(back)
        else:  # a component receives share · act · (1 - slope · mean + slope · g / T)
            y *= (step.share * maps.act)[:, None]
            beta = y.sum(-1) - step.slope[..., 0][:, None] * torch.einsum("skqi,sqi->skq", y, step.mean)
            for s in range(active):
                offsets[s].append(beta[s])
            through = maps.gates_transposed(y.flatten(0, 1)).view_as(back)
            back = back + through * (step.slope / settings.temperature)[:, None]
        if any(start.mid and start.entering == step.index for start in starts):
            back = _everywhere(back, step.queries, n)
        else:
            through = maps.ov_transposed(back.flatten(0, 1)).unflatten(0, (active, k))
            back = _everywhere(back, step.queries, n) + through
        if step.index in forward.released:
            x, owner, member = forward.released[step.index]
            score = torch.einsum("rnd,rknd->rk", x, back[owner])
            for s in range(active):
                at = owner == s
                score[at] += _offset(forward, s, offsets[s], member[at]).T
            own.append((owner, member, score))
        for s, start in enumerate(starts):
            if start.entering == step.index:
                scores[s] = start.named.project(back[s].to(start.bias.device))
                scores[s] += _offset(forward, s, offsets[s], None).to(scores[s])
    for owner, member, score in own:
        for s, start in enumerate(starts):
            at = (owner == s) & (member >= 0)
            scores[s][:, member[at].to(start.bias.device)] = score[at].T.to(scores[s])
    return scores


def extra_scores(forward: Forward, directions: Tensor, extra: int) -> Tensor:
    """Scores of `rest` or `bias` (as :mod:`forward` numbers them), zero where there is none: (starts, K)."""
    owner, member, score = _at_the_end(forward, directions)
    out = score.new_zeros(len(forward.starts), score.shape[1])
    return out.index_add_(0, owner[member == extra], score[member == extra])


def _at_the_end(forward: Forward, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Owner, member and score (R, K) of the rows that were explicit to the end."""
    rows = forward.rows
    return rows.owner, rows.member, rows.x[:, -1] @ directions.to(rows.x).T


def _everywhere(back: Tensor, queries: slice, n: int) -> Tensor:
    """Gradients at ``queries`` as gradients at all positions: (S, K, Q, D) -> (S, K, N, D)."""
    if back.shape[2] == n:
        return back
    out = back.new_zeros(*back.shape[:2], n, back.shape[3])
    out[:, :, queries] = back
    return out


def _offset(forward: Forward, s: int, offsets: Sequence[Tensor], member: Tensor | None) -> Tensor:
    """What a component receives at the layers passed so far though its state were zero: (K, 1 or M)."""
    if not offsets:
        return torch.zeros(1, 1, device=forward.rows.x.device)
    masks = forward.alive[s]
    if masks is None:
        return sum(beta.sum(1, keepdim=True).to(offsets[-1].device) for beta in offsets)
    total = 0.0
    for beta, mask in zip(offsets, reversed(masks), strict=False):
        mask = mask if member is None else mask[member.to(mask.device)]
        total = total + (beta @ mask.T.to(beta)).to(offsets[-1].device)
    return total
