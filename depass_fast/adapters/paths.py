"""The paths of a declaration, followed below a module."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import nn

from .family import Path
from .tuned import inside


def below(module: nn.Module, path: Path) -> Any:
    """The object under a path, or under the first of several that exists. AttributeError if none does."""
    if isinstance(path, str):
        return inside(attrgetter(path)(module))
    for name in path[:-1]:
        try:
            return inside(attrgetter(name)(module))
        except AttributeError:
            continue
    return inside(attrgetter(path[-1])(module))


def exists(module: nn.Module, path: Path) -> bool:
    """True if anything is found under a path."""
    try:
        return below(module, path) is not None
    except AttributeError:
        return False


def below_or_none(module: nn.Module, path: Path | None) -> Any:
    """The object under a path; None if there is no path, or nothing under it."""
    return below(module, path) if path is not None and exists(module, path) else None


def name_of(path: Path) -> str:
    """The path's name in messages: the first of several."""
    return path if isinstance(path, str) else path[0]
