"""Tokens that are parts of characters, as they are shown: joined with their neighbours where these complete them."""

import pytest

from depass_fast.labels import readable, shown_labels, shown_tokens, text_of_tokens
from tests.support.pages import LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_bytes_are_read_as_characters(language, width):
    """A text cut into pieces of some bytes is itself again, and every piece shows the characters that it holds."""
    text = "".join(LANGUAGES[language])
    raw = text.encode()
    tokens = [readable(raw[at : at + width]) for at in range(0, len(raw), width)]
    shown = shown_tokens(tokens)
    assert text_of_tokens(tokens) == text and not any("<0x" in one for one in shown)
    holders = [n // width for n, byte in enumerate(raw) if byte & 0xC0 != 0x80]  # where characters begin
    for character, holder in zip(text, holders, strict=True):
        assert character in shown[holder] or repr(character)[1:-1] in shown[holder]


def test_parts_are_numbered_and_what_is_no_character_stays():
    assert shown_tokens([" <0xE7><0x8E>", "<0x9B>", "a", "<0xE7>"]) == [" 玛¹⁄₂", "玛²⁄₂", "a", "<0xE7>"]
    assert shown_tokens(["<0xF0>", "<0x9F>", "<0x9A>", "<0x80>!"]) == ["🚀¹⁄₄", "🚀²⁄₄", "🚀³⁄₄", "🚀⁴⁄₄!"]
    assert shown_tokens([" e", "<0xCC>", "<0x81>"]) == [" e", "◌\u0301¹⁄₂", "◌\u0301²⁄₂"]  # a mark needs a base
    assert shown_tokens(["<0x0A>", "<0xC3><0xA9>", "<0x9B>"]) == ["\n", "é", "<0x9B>"]  # SentencePiece's, whole ones
    assert shown_tokens(["plain", "<s>", "<0xZZ>"]) == ["plain", "<s>", "<0xZZ>"]
    assert text_of_tokens(["<0x9B>", "x", "<0xE7>"]) == "<0x9B>x<0xE7>"


def test_labels_are_those_of_their_positions():
    tokens = ["<0xE7><0x8E>", "<0x9B>", " <0x9B>"]
    labels = [f"{tokens[n]!r}@{n}" for n in (2, 1, 0)]
    assert shown_labels([*labels, "L3H1", "rest"], tokens) == [labels[0], "'玛²⁄₂'@1", "'玛¹⁄₂'@0", "L3H1", "rest"]
