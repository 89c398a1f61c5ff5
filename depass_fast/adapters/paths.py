"""The paths of a declaration, followed below a module."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from .family import Path
from .tuned import inside


def below(module: nn.Module, path: Path) -> Any:
    """The object under a path, or under the first of several that exists. AttributeError if none does."""
    if isinstance(path, str):
        return _follow(module, path)
    for name in path[:-1]:
        try:
            return _follow(module, name)
        except AttributeError:
            continue
    return _follow(module, path[-1])


def _follow(found: Any, path: str) -> Any:
    """The object under one path. A call looks up thousands: modules are read without `__getattr__`."""
    for name in _names(path):
        parts = getattr(found, "_modules", None)  # of a scripted module it is no dict
        part = parts.get(name) if isinstance(parts, dict) else None
        found = getattr(found, name) if part is None else part
    return inside(found)


@cache
def _names(path: str) -> list[str]:
    return path.split(".")


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
