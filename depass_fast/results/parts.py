"""The parts of results that are objects of their own, as files keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .files import known_fields
from .provenance import Provenance
from .verification import Verification

_PARTS = {"provenance": Provenance, "verification": Verification}


def plain_values(result: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return some fields of a result as plain values."""
    values = {name: getattr(result, name) for name in names}
    return values | {name: None if values[name] is None else asdict(values[name]) for name in _PARTS if name in values}


def parts_of(values: dict[str, Any]) -> Mapping[str, Any]:
    """Take the parts out of plain ``values``, and return them made again."""
    given = {name: values.pop(name, None) for name in _PARTS}
    return {
        name: None if one is None else _PARTS[name](**known_fields(_PARTS[name], one)[0]) for name, one in given.items()
    }
