"""Data files: a JSON list of objects, or an object on every line; errors name the file, the line and the field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]
Fields: TypeAlias = Mapping[str, Any]  # a type, several, or the fields of an object inside

_BLANK = " \t\r\n"


def read_records(path: Path, fields: Fields, choices: Sequence[Sequence[str]] = ()) -> list[Record]:
    """Read the objects of a file, JSON or JSON lines.

    ``fields`` are the fields that each must have, with their types; a mapping of fields for an object inside. Of every
    group of names in ``choices`` it must have one, a text.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no UTF-8, no JSON, no list of objects, or empty; a field is missing, of another type or empty.
            The message names the file, the line where the object begins, and the field.
    """
    found = []
    for line, value in _values(path, _text(path)):
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {line}: expected an object with fields, got {type(value).__name__}.")
        _check(f"{path}, line {line}", value, fields, choices)
        found.append(value)
    if not found:
        raise ValueError(f"{path}: it holds no objects; expected a JSON list of objects, or one on every line.")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is no text in UTF-8 ({error.reason} at byte {error.start}).") from None


def _values(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the values of a list, or of lines, each with the line where it begins."""
    decoder, at = json.JSONDecoder(), _skip(text, 0, _BLANK)
    is_list = text[at : at + 1] == "["
    at = at + 1 if is_list else at
    end = "]" if is_list else ""
    while True:
        at = _skip(text, at, _BLANK)
        if text[at : at + 1] == end:  # of the list, or of the text
            _check_end(path, text, at + len(end))
            return
        try:
            value, after = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: no JSON ({error.msg}).") from None
        yield text.count("\n", 0, at) + 1, value
        at = _skip(text, after, _BLANK)
        if is_list and text[at : at + 1] == ",":
            at += 1
        elif is_list and text[at : at + 1] != "]":
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"{path}, line {line}: no JSON (expected a comma or the end of the list).")


def _check_end(path: Path, text: str, at: int) -> None:
    at = _skip(text, at, _BLANK)
    if at < len(text):
        raise ValueError(f"{path}, line {text.count(chr(10), 0, at) + 1}: no JSON (something follows the list).")


def _skip(text: str, at: int, what: str) -> int:
    while at < len(text) and text[at] in what:
        at += 1
    return at


def _check(place: str, value: Record, fields: Fields, choices: Sequence[Sequence[str]]) -> None:
    for name, kind in fields.items():
        if name not in value:
            raise ValueError(f"{place}: the field {name!r} is missing; there are {', '.join(value) or 'none'}.")
        if isinstance(kind, Mapping):
            _check_type(place, name, value[name], dict)
            _check(f"{place}, in {name!r}", value[name], kind, ())
        else:
            _check_type(place, name, value[name], kind)
    for names in choices:
        given = [name for name in names if name in value]
        if not given:
            wanted = " or ".join(map(repr, names))
            raise ValueError(f"{place}: the field {wanted} is missing; there are {', '.join(value) or 'none'}.")
        _check_type(place, given[0], value[given[0]], str)


def _check_type(place: str, name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(one.__name__ for one in kinds)
        raise ValueError(f"{place}: the field {name!r} is {type(value).__name__}, expected {expected}.")
    if value == "":
        raise ValueError(f"{place}: the field {name!r} is empty.")
