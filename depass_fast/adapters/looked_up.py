"""The weights that a call has looked up in a model: it asks for those of every layer some ten times."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from .maps import Linear
from .weights import Attention, Mlp

Found = TypeVar("Found", nn.ModuleList, Attention, tuple[Mlp, ...])

_here = threading.local()  # `kept`: what this thread has found, within a block of `looked_up_once`


@contextmanager
def looked_up_once() -> Iterator[None]:
    """Look up the weights of every layer once, within the block or the function that it decorates, in this thread.

    At the end all is forgotten, since a user may change the model between two calls. Projections whose weights are made
    when they are read (fused, quantised or adapted ones) are looked up anew every time: whoever keeps one would keep
    its numbers. Norms that add to their weights are small, and kept.
    """
    if getattr(_here, "kept", None) is not None:  # a block within another one
        yield
        return
    try:
        _here.kept = {}
        yield
    finally:
        _here.kept = None


def once(adapter: object, what: tuple, find: Callable[[], Found]) -> Found:
    """Return ``what`` that ``find`` finds in a model, or what it found before."""
    kept: dict[tuple, tuple[object, Any]] | None = getattr(_here, "kept", None)
    if kept is None:
        return find()
    key = id(adapter), *what
    if key in kept:
        return kept[key][1]
    found = find()
    if isinstance(found, nn.Module) or all(map(_is_plain, _linears(found))):
        kept[key] = adapter, found  # an adapter that lives has its identity for itself
    return found


def _linears(found: Attention | tuple[Mlp, ...]) -> Iterator[object]:
    if isinstance(found, Attention):
        yield from (found.v, found.o)
        return
    for mlp in found:
        yield from (mlp.gate, mlp.down, *(() if mlp.up is None else (mlp.up,)))


def _is_plain(linear: object) -> bool:
    """True if the weight that is read is the model's own tensor, so that holding it takes no memory."""
    if type(linear) is not Linear or linear.is_fused or not linear.is_own:
        return False
    return isinstance(linear.module, nn.Module) and "weight" in linear.module._parameters
