"""Labels: those of the two components that the library adds itself, and the texts of tokens that are parts of one.

A token that is a part of a character has a text such as `<0xE6><0x97>`, which is exact, and by which it can be asked
for. Where tokens are looked at in their order, it is shown as the character that it completes with its neighbours, and
which part of it it is: `日¹⁄₂`, `日²⁄₂`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

REST, BIAS = "rest", "bias"
_QUOTED = re.compile(r"""(?<!\w)(['"])(?:\\.|(?!\1).)*\1""")  # a text as ``repr`` writes it
_SIGNS = {r"\n": "⏎", r"\t": "⇥"}
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte in the text of a token

_RAISED, _LOWERED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"), str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def shown_tokens(tokens: Sequence[str]) -> list[str]:
    """Return the texts (N,) by which the tokens of a text are shown, in their order: bytes are read as characters.

    Characters that several tokens hold are marked with their parts; bytes that complete no character stay as they are.
    Other tokens are what they were.
    """
    found = list(tokens)
    for run in _runs(tokens):
        texts = [""] * len(run)
        for character, holders in _characters([tokens[n] for n in run]):
            for part, holder in enumerate(holders, 1):
                texts[holder] += character if len(holders) == 1 else _marked(character, part, len(holders))
        for n, text in zip(run, texts, strict=True):
            found[n] = text
    return found


def text_of_tokens(tokens: Sequence[str]) -> str:
    """Return the text that tokens make together; bytes that complete no character are written as they are in theirs."""
    found = list(tokens)
    for run in _runs(tokens):
        found[run.start : run.stop] = [
            "".join(character for character, _ in _characters([tokens[n] for n in run])),
            *[""] * (len(run) - 1),
        ]
    return "".join(found)


def shown_labels(labels: Sequence[str], tokens: Sequence[str]) -> list[str]:
    """Return labels, those of the ``tokens`` of a text as they are shown."""
    own = position_labels(tokens)
    shown = dict(zip(own, position_labels(shown_tokens(tokens)), strict=True))
    return [shown.get(label, label) for label in labels]


def position_labels(tokens: Sequence[str]) -> list[str]:
    """Return the labels (N,) of tokens: their text, quoted, and their position."""
    return [f"{token!r}@{n}" for n, token in enumerate(tokens)]


def with_signs(text: str) -> str:
    """Return a text in which quoted line breaks and tabs are the signs by which tokens are shown, ⏎ and ⇥."""
    return _QUOTED.sub(lambda quoted: re.sub(r"\\.", lambda one: _SIGNS.get(one[0], one[0]), quoted[0]), text)


def raw_bytes(text: str) -> bytes:
    """Return the bytes of a token's text. Bytes that are a character are a text's own, unless they are all of it."""
    whole = BYTE.fullmatch(text)
    if whole:
        return bytes([int(whole[1], 16)])
    pieces = BYTE.split(text)  # texts at even places, bytes at odd ones
    return b"".join(
        (bytes([int(piece, 16)]) if piece >= "80" else f"<0x{piece}>".encode())
        if place % 2
        else piece.encode("utf-8", errors="replace")
        for place, piece in enumerate(pieces)
    )


def readable(raw: bytes) -> str:
    """Return bytes as text; those that are no character as `<0xE6>`."""
    return "".join(map(_written, raw.decode("utf-8", errors="surrogateescape")))


def _runs(tokens: Sequence[str]) -> Iterator[range]:
    """Yield the longest runs of tokens with bytes in their texts."""
    start = None
    for n, token in enumerate([*tokens, ""]):
        if "<0x" in token and BYTE.search(token):
            start = n if start is None else start
        elif start is not None:
            yield range(start, n)
            start = None


def _characters(texts: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Yield the characters of texts, or the bytes that are none, and the numbers of the texts that hold each."""
    raw = [raw_bytes(text) for text in texts]
    owners = [n for n, part in enumerate(raw) for _ in part]
    at = 0
    for character in b"".join(raw).decode("utf-8", errors="surrogateescape"):
        width = len(character.encode("utf-8", errors="surrogateescape"))
        yield _written(character), list(dict.fromkeys(owners[at : at + width]))
        at += width


def _written(character: str) -> str:
    """Return a character, or a byte that is none as `<0xE6>`."""
    return f"<0x{ord(character) - 0xDC00:02X}>" if "\udc80" <= character <= "\udcff" else character


def _marked(character: str, part: int, parts: int) -> str:
    """Return a character with the number of its part; a mark that stands on another one is shown on a circle."""
    base = "◌" if unicodedata.category(character) in ("Mn", "Mc", "Me") else ""
    seen = character if character.isprintable() else repr(character)[1:-1]
    return f"{base}{seen}{str(part).translate(_RAISED)}⁄{str(parts).translate(_LOWERED)}"
