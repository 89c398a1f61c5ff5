"""The texts of single tokens, which label prompts and targets, and the way back from a text to an id.

A token's text is what its entry of the vocabulary adds to a text, with its space. Bytes that are no character by
themselves are written as `<0xE6>`. Different ids have different texts, as far as the vocabulary tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..labels import BYTE, raw_bytes, readable
from .doubts import doubt
from .prompts import required
from .text import check_text

_SPACE = "▁"  # SentencePiece's
_WORD_END = "</w>"  # a space behind the entry, in the oldest vocabularies
_UNREADABLE = "\ufffd"


def _alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes the 256 bytes."""
    written = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in written]
    return {chr(byte): byte for byte in written} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _alphabet()
_CHARACTERS = {byte: character for character, byte in _ALPHABET.items()}


def token_texts(ids: Tensor | Sequence[int], tokenizer: Any | None) -> list[str]:
    """The text of every token (N,); its number where there is no tokenizer."""
    listed = ids.tolist() if isinstance(ids, Tensor) else ids
    return [str(i) if tokenizer is None else _text(i, tokenizer) for i in listed]


def token_with_text(text: str, tokenizer: Any) -> int | None:
    """The id of the token whose text this is, exactly; None where the vocabulary has none."""
    look_up = getattr(tokenizer, "convert_tokens_to_ids", None)
    if look_up is None:
        return None
    if _mistral(tokenizer) is not None:
        look_up = tokenizer.get_vocab().get  # without a line in the log for each that is not there
    byte_level = "".join(_CHARACTERS[byte] for byte in raw_bytes(text))
    for entry in dict.fromkeys([text, text.replace(" ", _SPACE), byte_level, text.removesuffix(" ") + _WORD_END]):
        token = look_up(entry)
        if isinstance(token, int) and _text(token, tokenizer) == text:
            return token
    return None


def _text(token: int, tokenizer: Any) -> str:
    entry = _entry(token, tokenizer)
    if entry is None:
        return f"<id {token}>"
    if isinstance(entry, bytes):
        return readable(entry)
    if BYTE.fullmatch(entry):
        return entry
    mistral = _mistral(tokenizer)
    if mistral is not None:
        return _mistral_text(token, entry, mistral)
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if _UNREADABLE in text and _ALPHABET.keys() >= set(entry):
        return readable(bytes(_ALPHABET[character] for character in entry))
    if _SPACE in entry and _SPACE not in text:
        return entry.replace(_SPACE, " ")
    if entry.endswith(_WORD_END) and not text.endswith(_WORD_END):
        return text + " "
    return text or entry


def _entry(token: int, tokenizer: Any) -> str | bytes | None:
    """The vocabulary's entry of an id; None where it has none, as for the ids that fill up an embedding."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return tokenizer.decode([token], clean_up_tokenization_spaces=False)
    try:
        entry = tokenizer.convert_ids_to_tokens(token)
    except (IndexError, KeyError, OverflowError, ValueError):  # tokenizers say it in various ways
        return None
    unknown = getattr(tokenizer, "unk_token_id", None)
    if entry is not None and entry == getattr(tokenizer, "unk_token", None) and token != unknown:
        return None  # the slow ones give `unk` for any id that is not theirs
    return entry


def _mistral(tokenizer: Any) -> Any | None:
    """The tokenizer of mistral-common inside another one; None for others."""
    inner = getattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer", None)
    return getattr(inner, "tokenizer", None)


def _mistral_text(token: int, entry: str, mistral: Any) -> str:
    if mistral.is_special(token):
        return entry
    if hasattr(mistral, "id_to_byte_piece"):
        return readable(mistral.id_to_byte_piece(token))
    return entry.replace(_SPACE, " ")


def single_token(text: str, tokenizer: Any | None, argument: str = "target") -> int:
    """The id of a text that is a single token by itself, or the text of one, as results show it.

    Raises:
        ValueError: it is several tokens (the message names them, and a variant that is one), or none.
    """
    reader = required(tokenizer, f"{argument} {text!r}")
    if not text:
        raise ValueError(f"{argument}: empty string; give one token, or None for the model's own next token.")
    check_text(text, argument)
    token = _one(text, reader)
    if token is not None:
        _doubt_namesake(text, token, reader, argument)
        return token
    ids, bare = reader.encode(text, add_special_tokens=False), text.strip()
    if len(ids) == 1:
        problem = f"{text!r} is not in the tokenizer's vocabulary"
    else:
        parts = ", ".join(f"{part!r} ({i})" for part, i in zip(token_texts(ids, reader), ids, strict=True))
        problem = f"{text!r} is {len(ids)} tokens: [{parts}]; one is needed"
    others = [f" {bare}", bare] if bare else [f"<0x{byte:02X}>" for byte in text.encode()[:1] if len(text) == 1]
    variant = next((other for other in others if other != text and _one(other, reader) is not None), None)
    hint = "" if variant is None else f" {variant!r} is one token."
    more = (
        " Several tokens are given to attribute(..., continuation=...)."
        if argument == "target" and len(ids) > 1
        else ""
    )
    raise ValueError(f"{argument}: {problem}.{hint}{more}")


def lacks_space(text: str, before: str, tokenizer: Any) -> bool:
    """True for a word that is read right behind a word, where the word with a space in front is another token.

    ``before`` is the text of the token that it follows. Scripts without capitals, which may have no spaces, never do.
    """
    first, last = text[:1], before[-1:]
    if not (_is_spaced(first) and _is_spaced(last)) or (first.isdigit() and last.isdigit()):
        return False
    apart = _one(f" {text}", tokenizer)
    return apart is not None and apart != _one(text, tokenizer)


def _is_spaced(character: str) -> bool:
    """True for letters of scripts that know capitals and spaces, and for digits."""
    return character.isdigit() or character.lower() != character.upper()


def _doubt_namesake(text: str, token: int, tokenizer: Any, argument: str) -> None:
    """Warn where a text reads as one token, as with SentencePiece's space in front, and is the label of another."""
    other = token_with_text(text, tokenizer)
    if other is not None and other != token:
        doubt(
            f"{argument}: {text!r} by itself is the token {_text(token, tokenizer)!r} (id {token}) and read as that. "
            f"The token with the label {text!r} is another (id {other}); give the id of the one that is meant."
        )


def _one(text: str, tokenizer: Any) -> int | None:
    """The id of a text that is one token by itself, or one's text; None for others."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if len(ids) == 1 and (ids[0] != unknown or text == tokenizer.unk_token):
        return ids[0]
    return token_with_text(text, tokenizer)
