"""Result files: safetensors whose header carries everything else as JSON. Every kind of result registers its format.

A format's name ends in its number, as in ``depass_fast.attribution.v1``. The number goes up when files can no longer be
read by what read them before. A field more is no such change: a reader keeps the fields that it does not know, and
writes them back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..runtime.paths import check_path
from ..version import __version__

T = TypeVar("T")
Restore = Callable[[dict[str, Tensor], dict[str, Any]], Any]

_RESTORE: dict[str, Restore] = {}
_READ_BY = {  # by the first part of a format's name
    "depass_fast.ledger": "load_ledger(path) of the model's DePass",
    "depass_fast.attribution": "Attribution.load(path)",
    "depass_fast.layers": "Attribution.load(path)",
    "depass_fast.continuation": "Continuation.load(path)",
    "depass_fast.generation": "Generation.load(path)",
    "depass_fast.attention": "AttentionExplanation.load(path)",
    "depass_fast.attention_credit": "AttentionCredit.load(path)",
}


def register_format(name: str, restore: Restore) -> None:
    """Say how the files of a format become results: ``restore(tensors, content)``."""
    _RESTORE[name] = restore


def write_result(path: str | Path, name: str, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Write ``tensors`` and plain ``content`` as a file of the format ``name``. Nothing is pickled.

    Raises:
        OSError: the file cannot be written, see :func:`check_path`.
    """
    check_path(path)
    try:
        save_file(tensors, str(path), metadata={"format": name, "json": json.dumps(content)})
    except SafetensorError as error:
        raise OSError(f"{path}: it cannot be written ({error}).") from error


def read_result(path: str | Path, name: str | None = None) -> Any:
    """Read a file of the format ``name``, by default of any registered format.

    Raises:
        ValueError: the file has another format, is damaged, or is not a safetensors file.
    """
    found, tensors, text = read_file(path, list(_RESTORE) if name is None else [name], "a saved attribution")
    with damage_told(path, found):
        return _RESTORE[found](tensors, json.loads(text))


def read_file(path: str | Path, known: list[str], what: str) -> tuple[str, dict[str, Tensor], str]:
    """Return the format of a file, its tensors, and its content as JSON; ``known`` are the formats of ``what``.

    Raises:
        ValueError: the file has another format, or is not a safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error
    found = metadata.get("format")
    if found not in known:
        raise ValueError(f"{path}: {_why_unknown(found, known, what)}")
    return found, tensors, metadata.get("json", "")


@contextmanager
def damage_told(path: str | Path, found: str) -> Iterator[None]:
    """Raise what a file of the format ``found`` lacks, or has in other shapes, as a ValueError with its path."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, {found} has other parts ({type(error).__name__}: {error})") from error


def _why_unknown(found: str | None, known: list[str], what: str) -> str:
    """Return the reason why a format is none of those that are ``known``, of ``what``."""
    base, _, number = (found or "").rpartition(".v")
    for one in known:
        known_base, _, known_number = one.rpartition(".v")
        if base == known_base and number.isdecimal() and int(number) > int(known_number):
            return (
                f"it has format {number} of {base}, and depass_fast {__version__} reads up to format {known_number}; "
                "a newer version of depass_fast wrote it: pip install -U depass-fast"
            )
    read_by = next((f"; {call} reads it" for name, call in _READ_BY.items() if base == name), "")
    return f"not {what} (format {found!r}, not {' or '.join(map(repr, known))}){read_by}"


def known_fields(cls: type, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values that are fields of a dataclass, and those that are not."""
    names = {field.name for field in fields(cls)}
    unknown = {name: value for name, value in values.items() if name not in names}
    return {name: value for name, value in values.items() if name in names}, unknown


def restore_part(
    make: Callable[..., T], cls: type, values: Mapping[str, Any] | None
) -> tuple[T | None, dict[str, Any]]:
    """Return the object that a part of a file describes, ``make(**fields)``, and the part's unknown fields."""
    if values is None:
        return None, {}
    known, unknown = known_fields(cls, values)
    return make(**known), unknown


def plain_part(part: Any, unknown: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a part of a result as a file keeps it, with the ``unknown`` fields that it came with."""
    if part is None:
        return None
    values = part.to_dict() if hasattr(part, "to_dict") else asdict(part)
    return values | dict(unknown or {})
