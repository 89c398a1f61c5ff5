"""The check of a text before a tokenizer reads it."""

from __future__ import annotations


def check_text(text: str, argument: str) -> None:
    """Raise ValueError for a lone surrogate, half of a pair that stands for a character: no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{argument}: character {error.start} is {text[error.start]!r}, a lone surrogate, which is no text; "
            "replace it, or mend how the text was decoded."
        ) from None
