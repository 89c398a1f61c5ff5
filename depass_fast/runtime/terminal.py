"""Text for terminals and pipes of any encoding. Where it lacks a character, bars are ASCII, and others are escaped."""

from __future__ import annotations

import codecs
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

POSITIVE_BAR, NEGATIVE_BAR, SHORTEST_BAR = "█", "▒", "▏"

_IN_ASCII = {POSITIVE_BAR: "#", NEGATIVE_BAR: "-", SHORTEST_BAR: "|"}
_RAISING = ("strict", "surrogateescape")  # the error handlers of streams that raise for a character they lack


def output_encoding() -> str:
    """Return the encoding of standard output; UTF-8 where it has none, as in memory."""
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def encodable(text: str, encoding: str | None = None) -> str:
    """Return a text that an encoding, by default standard output's, can hold.

    Each character that it lacks is replaced: a bar's by one of ASCII, so that it keeps its length, another by its
    escape, such as ``\\u65e5``.
    """
    encoding = encoding or output_encoding()
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(_encodable_character(character, encoding) for character in text)
    except LookupError:  # no codec of that name; the stream has one of its own
        return text
    return text


def _encodable_character(character: str, encoding: str) -> str:
    try:
        codecs.encode(character, encoding)
    except UnicodeEncodeError:
        return _IN_ASCII.get(character) or character.encode("ascii", "backslashreplace").decode("ascii")
    return character


def text_width(text: str) -> int:
    """Return the columns that a text takes on a terminal: wide East Asian characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


@contextmanager
def escaping_output() -> Iterator[None]:
    """Let standard output and standard error escape a character that they lack, where they would raise an error."""
    changed: list[tuple[Any, str]] = []
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        errors = getattr(stream, "errors", None)
        if errors in _RAISING and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
            changed.append((stream, errors))
    try:
        yield
    finally:
        for stream, errors in changed:
            stream.reconfigure(errors=errors)
