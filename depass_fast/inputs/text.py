"""Texts: their check before a tokenizer reads them, and the space between a prompt and what follows it."""

from __future__ import annotations

OPENING, QUOTES = "([{-/—“‘«", "\"'"


def check_text(text: str, argument: str) -> None:
    """Raise ValueError for a lone surrogate, half of a pair that stands for a character: no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{argument}: character {error.start} is {text[error.start]!r}, a lone surrogate, which is no text; "
            "replace it, or mend how the text was decoded."
        ) from None


def spaced(prompt: str, answer: str) -> str:
    """Return the answer as it follows the prompt: with a space, but behind white space and what opens or joins."""
    before, last = prompt[-2:-1], prompt[-1:]
    opens = last in OPENING or (last in QUOTES and (not before or before.isspace()))
    return answer if answer.startswith(" ") or not last or last.isspace() or opens else f" {answer}"
