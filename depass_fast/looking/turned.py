"""The turns of queries and keys for the prompts of a trace, measured once for a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..adapters import Adapter
from ..trace.consistency import computation
from ..trace.turns import Turns, measure_turns

_KEPT = 8  # computations and lengths remembered of a model

_measured: WeakKeyDictionary[nn.Module, dict[tuple, tuple[int, dict[int, Turns]]]] = WeakKeyDictionary()


def turns_of(adapter: Adapter, prompts: Sequence[Tensor], layers: Collection[int]) -> list[dict[int, Turns]]:
    """Return the turns of ``layers`` for every one of the ``prompts`` (ids, each (N,)).

    They depend on positions alone, so that the longest prompt stands for all, and a model is asked once, by one more
    forward pass. Where they depend on a prompt's length, too, it is asked once for every length. Hooks, code or buffers
    (frequencies) that have changed make it be asked again.

    Raises:
        ValueError: what a layer does between projections and attention cannot be expressed.
    """
    if not adapter.one_by_one:
        return [_of_length(adapter, max(prompts, key=len), layers, ())] * len(prompts)
    return [_of_length(adapter, ids, layers, (len(ids),)) for ids in prompts]


def _of_length(adapter: Adapter, ids: Tensor, layers: Collection[int], key: tuple) -> dict[int, Turns]:
    known = _measured.setdefault(adapter.model, {})
    buffers = tuple((one.data_ptr(), one._version) for one in adapter.model.buffers() if not one.is_inference())
    key = (*computation(adapter.model), buffers, *key)
    length, found = known.pop(key, (0, {}))
    if length < len(ids):
        length, found = len(ids), {}
    missing = [layer for layer in layers if layer not in found]
    if missing:
        some = measure_turns(adapter, ids if length == len(ids) else _longer(ids, length), missing)
        found = found | some
    known[key] = length, found
    while len(known) > _KEPT:
        del known[next(iter(known))]
    return found


def _longer(ids: Tensor, length: int) -> Tensor:
    """Return ids of the ``length`` that other layers were asked with: which ones does not matter."""
    return ids.repeat(-(-length // len(ids)))[:length]
