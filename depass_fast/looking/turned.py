"""The turns of queries and keys for the prompts of a trace."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from ..adapters import Adapter
from ..trace.turns import Turns, measure_turns


def turns_of(adapter: Adapter, prompts: Sequence[Tensor], layers: Collection[int]) -> list[dict[int, Turns]]:
    """Measure the turns of ``layers`` for every one of the ``prompts`` (ids, each (N,)).

    Where they do not depend on a prompt's length, the longest stands for all.

    Raises:
        ValueError: what a layer does between projections and attention cannot be expressed.
    """
    if not adapter.one_by_one:
        longest = measure_turns(adapter, max(prompts, key=len), layers)
        return [longest] * len(prompts)
    return [measure_turns(adapter, ids, layers) for ids in prompts]
