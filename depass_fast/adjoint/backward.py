"""The adjoint: one way back through the linearised layers yields every component's score (docs/adjoint.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..runtime.transfer import to_device
from .approximation import Approximation
from .forward import Forward, Step
from .maps import LayerMaps
from .stack import LayerStack


def linear_scores(
    stack: LayerStack, forward: Forward, directions: Tensor, approximation: Approximation
) -> list[Tensor]:
    """Return first-order scores (K, M) of every start's named components, in ``directions`` (K, D) at the stack's end.

    The explicit components' are those of their own path: exact given log Z as far as they were carried.
    """
    way = _WayBack(stack, forward, directions, approximation)
    for step in reversed(forward.steps):
        way.pass_layer(step)
        stack.progress.finish()
    return way.scores()


@dataclass(frozen=True)
class _RowScores:
    """Scores (r, K) of explicit rows; ``owner`` and ``member`` (r,) are in host memory."""

    owner: Tensor
    member: Tensor
    scores: Tensor


class _WayBack:
    """A way back through a forward's layers: gradients (S, K, Q, D) of the S starts that are still under way."""

    def __init__(self, stack: LayerStack, forward: Forward, directions: Tensor, approximation: Approximation) -> None:
        self._stack, self._forward, self._temperature = stack, forward, approximation.temperature
        self._k, self._like = len(directions), directions
        self._offsets = _Offsets(forward, self._k, stack.n, directions)
        self._own = [_at_the_end(forward, directions)]
        self._back = directions[None, :, None].repeat(len(forward.starts), 1, 1, 1)
        self._narrow: Tensor | None = None  # the same in the products' dtype, where it was written along
        self._scores: dict[int, Tensor] = {}
        last = slice(stack.n - 1, stack.n)
        for s, start in enumerate(forward.starts):
            if start.entering >= stack.end:
                gradient = _everywhere(self._back[s : s + 1], last, stack.n)[0]
                self._scores[s] = start.named.project(gradient.to(start.bias))

    def pass_layer(self, step: Step) -> None:
        """Take the gradients back through a layer, and read with them the components that begin there."""
        maps, starts = self._stack.maps(step.index), self._forward.starts
        active = sum(start.entering <= step.index for start in starts)
        mid = any(start.mid and start.entering == step.index for start in starts)
        self._back = self._back[:active].to(maps.device)
        self._narrow = None if self._narrow is None else self._narrow[:active].to(maps.device)
        if maps.fused:
            self._through_fused(step, maps, mid)
        else:
            read = self._through_mlp(step, maps)
            if not maps.parallel:
                self._back = self._back + read
            if mid:
                self._back = _everywhere(self._back, step.queries, self._stack.n)
            else:
                self._through_attention(step, maps, read)
        self._score_released(step.index)
        for s, start in enumerate(starts):
            if start.entering == step.index:
                self._scores[s] = start.named.project(self._back[s].to(start.bias.device))

    def _through_mlp(self, step: Step, maps: LayerMaps) -> Tensor:
        """Return what the MLP reads, as gradients (S, K, Q, D), and take the others back through its norm."""
        active = len(self._back)
        self._back = self._behind(maps, "mlp")
        crowd = step.crowd
        y = maps.down_transposed(self._back.flatten(0, 1)).unflatten(0, (active, self._k))  # (S, K, Q, I)
        # a component receives share · act · (1 - slope · mean + slope · g / T)
        y *= (crowd.share * maps.act)[:, None]
        offsets = y.sum(-1) - crowd.slope[..., 0][:, None] * torch.einsum("skqi,sqi->skq", y, crowd.mean)
        self._offsets.add(offsets, step.queries)
        read = maps.gates_transposed(y.flatten(0, 1)).view_as(self._back)
        return read * (crowd.slope / self._temperature)[:, None]

    def _behind(self, maps: LayerMaps, module: str) -> Tensor:
        """Return the gradients of what "attention" or "mlp" adds: behind the stream's own norm, where there is one."""
        rows = self._back.flatten(0, 1)
        back = maps.normed(rows, module, transposed=True)
        return self._back if back is rows else back.view(self._back.shape)

    def _through_attention(self, step: Step, maps: LayerMaps, read: Tensor) -> None:
        """Take the gradients back through attention and its norm; ``read`` joins them before it in a parallel layer."""
        self._back = self._behind(maps, "attention")
        through = maps.ov_transposed(self._back.flatten(0, 1)).unflatten(0, self._back.shape[:2])
        back = self._back + read if maps.parallel else self._back
        self._back = through.add_(_everywhere(back, step.queries, self._stack.n))

    def _through_fused(self, step: Step, maps: LayerMaps, mid: bool) -> None:
        """Take the gradients back through a layer by kernels that add to them in place."""
        from .fused import FusedMaps  # needs Triton

        assert isinstance(maps, FusedMaps)
        crowd, queries, n = step.crowd, step.queries, self._stack.n
        offsets = self._offsets.room(len(self._back), queries, maps.device)
        tables = crowd.log_z, crowd.share, crowd.mean, crowd.slope
        read = maps.gates_read(self._narrow_behind(maps, "mlp"), self._temperature, tables, offsets)
        if self._offsets.by_position:
            self._offsets.add(offsets, queries)
        if not maps.parallel:
            self._narrow = maps.add_mlp_back(self._back, read)
        if mid:
            self._back, self._narrow = _everywhere(self._back, queries, n), None
            return
        through = maps.values_read(self._narrow_behind(maps, "attention").flatten(0, 1))
        if maps.parallel:
            maps.add_mlp_back(self._back, read)
        self._back = _everywhere(self._back, queries, n)
        self._narrow = maps.add_attention_back(self._back, through)

    def _narrow_behind(self, maps: LayerMaps, module: str) -> Tensor:
        """Take the gradients back through the stream's own norm, if any, and return them in the products' dtype."""
        back = self._behind(maps, module)
        if self._narrow is None or back is not self._back:
            self._narrow = back.to(maps.compute)
        self._back = back
        return self._narrow

    def _score_released(self, index: int) -> None:
        """Read the rows that were released before a layer."""
        released = self._forward.released.get(index)
        if released is None:
            return
        seen = self._back[to_device(released.owner, self._back.device)]
        scores = torch.einsum("rnd,rknd->rk", released.x.to(seen), seen)
        scores = scores + self._offsets.of_rows(released.owner, released.member)
        self._own.append(_RowScores(released.owner, released.member, scores))

    def scores(self) -> list[Tensor]:
        """Return the scores (K, M) of every start, with those of the rows that had a path of their own."""
        sizes = [len(start.named) for start in self._forward.starts]
        edges = torch.tensor([0, *sizes], device="cpu").cumsum(0)
        flat = torch.cat([self._scores[s].to(self._like.device) for s in range(len(sizes))], dim=1)
        self._offsets.add_to(flat, sizes)
        owner, member = (torch.cat([getattr(own, name) for own in self._own]) for name in ("owner", "member"))
        found = torch.cat([own.scores.to(flat) for own in self._own])
        named = (member >= 0).nonzero()[:, 0]
        if len(named):  # each of them once: a row that was released is not there at the end
            at = to_device(edges[owner[named]] + member[named], flat.device)
            flat[:, at] = found[to_device(named, flat.device)].T
        return list(flat.split(sizes, dim=1))


class _Offsets:
    """The shares that components receive at the layers passed so far with gates of zero, where they are alive."""

    def __init__(self, forward: Forward, k: int, n: int, like: Tensor) -> None:
        self._total = like.new_zeros(len(forward.starts), k, n)  # of a component that is alive everywhere
        # the others' masks (M, Q) from the first layer on, and what was added per position, from the last layer on
        self._alive = {s: masks for s, masks in enumerate(forward.alive) if masks is not None}
        self._passed: dict[int, list[Tensor]] = {s: [] for s in self._alive}

    @property
    def by_position(self) -> bool:
        """True where what a layer adds is needed by itself, as components are not alive everywhere."""
        return bool(self._passed)

    def room(self, active: int, queries: slice, device: torch.device) -> Tensor:
        """Return a tensor (S, K, Q) that a layer may add to; :meth:`add` has then to follow where ``by_position``."""
        self._total = self._total.to(device)
        room = self._total[:active, :, queries]
        return torch.zeros_like(room) if self.by_position else room

    def add(self, beta: Tensor, queries: slice) -> None:
        """Add what a layer gives per position: (S, K, Q)."""
        self._total = self._total.to(beta.device)
        self._total[: len(beta), :, queries].add_(beta)
        for s, passed in self._passed.items():
            if s < len(beta):
                passed.append(beta[s])

    def add_to(self, scores: Tensor, sizes: Sequence[int]) -> None:
        """Add the offsets of all components to their scores (K, ΣM), those of a start, ``sizes``, side by side."""
        whole = self._total.sum(2).T.to(scores.device)  # (K, S)
        runs = [(len(list(same)), size) for size, same in groupby(sizes)]
        parts = zip(scores.split([count * size for count, size in runs], 1), runs, strict=True)
        if self._passed:
            whole[:, list(self._passed)] = 0.0
        for (part, run), offsets in zip(parts, whole.split([count for count, _ in runs], 1), strict=True):
            part.unflatten(1, run).add_(offsets[..., None])
        for s, part in enumerate(scores.split(list(sizes), 1)):
            if s in self._passed:
                part.add_(self._masked(s).to(part.device))

    def of_rows(self, owner: Tensor, member: Tensor) -> Tensor:
        """Return the offsets of single components so far: (r, K)."""
        device = self._total.device
        found = self._total.sum(2)[to_device(owner, device)]
        for s in self._passed:
            at = (owner == s).nonzero()[:, 0]
            if len(at):
                found[to_device(at, device)] = self._masked(s)[:, to_device(member[at], device)].T
        return found

    def _masked(self, s: int) -> Tensor:
        masks, passed = self._alive[s], self._passed[s]
        if not passed:
            return self._total[s].sum(1, keepdim=True).expand(-1, len(masks[0]))
        total = self._total.new_zeros(self._total.shape[1], len(masks[0]))
        for beta, mask in zip(passed, reversed(masks), strict=False):
            total += (beta @ mask.T.to(beta)).to(total.device)
        return total


def extra_scores(forward: Forward, directions: Tensor, extra: int) -> Tensor:
    """Return scores of `rest` or `bias`, zero where there is none: (starts, K).

    ``extra`` is REST_ROW or BIAS_ROW of :mod:`depass_fast.adjoint.rows`.
    """
    found = _at_the_end(forward, directions)
    out = found.scores.new_zeros(len(forward.starts), found.scores.shape[1])
    at = (found.member == extra).nonzero()[:, 0]
    return out.index_add_(0, to_device(found.owner[at], out.device), found.scores[to_device(at, out.device)])


def _at_the_end(forward: Forward, directions: Tensor) -> _RowScores:
    """Return the scores of the rows that were explicit to the end."""
    rows = forward.rows
    return _RowScores(rows.owner, rows.member, rows.x[:, -1] @ directions.to(rows.x).T)


def _everywhere(back: Tensor, queries: slice, n: int) -> Tensor:
    """Return gradients at ``queries`` as gradients at all positions: (S, K, Q, D) -> (S, K, N, D)."""
    if back.shape[2] == n:
        return back
    out = back.new_zeros(*back.shape[:2], n, back.shape[3])
    out[:, :, queries] = back
    return out
