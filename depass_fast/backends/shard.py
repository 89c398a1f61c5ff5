"""The streaming backend on a part of the components: the others are carried by the other ranks of a process group.

Every rank gathers the statistics of its own components for an MLP (:mod:`.stream`). They are reduced over the ranks,
and then every component's share depends on itself alone. Attention, linear rules and the readout exchange nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.ranks import Ranks
from ..state.state import ComponentState
from .merge import merge
from .statistics import Statistics
from .stream import StreamBackend
from .torch.blocks import Block


class ShardBackend(StreamBackend):
    """Carries this rank's part of a state, on ``device`` or with ``streams`` in host memory.

    All ranks carry a state through the same layers, also one that has no components on some of them.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        compute_dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        streams: bool = False,
    ) -> None:
        super().__init__(device, compute_dtype, memory_budget)
        self.ranks, self.streams, self.name = ranks, streams, shard_name(ranks.size, streams)
        self.streamable = not streams

    def _take(self, state: ComponentState, block: Block, device: torch.device, name: str = "rows") -> Tensor:
        if self.streams:
            return super()._take(state, block, device, name)
        return state.rows[block.rows].clone() if isinstance(block.rows, slice) else state.rows[block.rows]

    def _put(self, state: ComponentState, block: Block, changed: Tensor) -> None:
        if self.streams:
            super()._put(state, block, changed)
        else:
            state.rows[block.rows] = changed

    def _complete(self, statistics: Statistics) -> None:
        assert self.ranks is not None
        merge(statistics, self.ranks)


def shard_name(size: int, streams: bool = False) -> str:
    """Return the backend's name in results and plans, for so many ranks."""
    return f"torch, streamed, sharded over {size}" if streams else f"torch, sharded over {size}"
