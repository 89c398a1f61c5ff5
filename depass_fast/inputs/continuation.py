"""A given continuation: its ids follow those of the prompt, which stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter
from ..runtime.log import warn_user
from ..runtime.numbers import as_index
from .doubts import doubt_padding, doubt_second_start
from .encodings import is_encoding
from .prompts import encode_all
from .text import check_text

_ANCHORS = ("\n", ".", "a")  # texts in front of which a text has no prefix space of its own


class TokenBoundaryWarning(UserWarning):
    """A prompt and its continuation are other tokens where they are tokenised as one text."""


def encode_continued(
    prompt: Any,
    continuation: Any,
    adapter: Adapter,
    tokenizer: Any | None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[bool, list[Tensor], list[int]]:
    """Return the ids (N,) of every prompt with its ``continuation`` behind it, and the prompts' own lengths.

    A continuation is text, or ids: one for all prompts, or a list with one per prompt. Text has the tokens that it has
    behind the prompt, and no special tokens. Where the two texts together would change the prompt's own last tokens,
    the continuation is tokenised by itself, with a :class:`TokenBoundaryWarning`. BOS in front of a continuation, and
    padding at its ends, are warned of.

    Returns:
        True if several prompts are given rather than one; the ids; the lengths.

    Raises:
        ValueError: an empty continuation, ids outside the vocabulary, more tokens than the model's context, another
            number of continuations than of prompts, no tokenizer for text; and as :func:`encode_all` of the prompts.
        TypeError: anything that is neither text nor ids.
    """
    batch, prompts = encode_all(prompt, adapter, tokenizer, template_kwargs)
    whole = []
    for ids, text, given in zip(
        prompts, _texts(prompt, batch, len(prompts)), _per_prompt(continuation, len(prompts)), strict=True
    ):
        own = _text_ids(given, text, ids.tolist(), tokenizer) if isinstance(given, str) else _listed_ids(given)
        _check(own, len(ids), adapter)
        doubt_second_start(own, tokenizer)
        doubt_padding(own, tokenizer, "continuation")
        whole.append(torch.cat([ids, torch.tensor(own, dtype=torch.long, device="cpu")]))
    return batch, whole, [len(ids) for ids in prompts]


def _texts(prompt: Any, batch: bool, count: int) -> list[str | None]:
    """Return the text of every prompt; None where it was given as something else."""
    if is_encoding(prompt):
        return [None] * count
    return [one if isinstance(one, str) else None for one in (prompt if batch else [prompt])]


def _per_prompt(continuation: Any, count: int) -> list[Any]:
    """Return the continuation of each of ``count`` prompts."""
    if isinstance(continuation, str):
        return [continuation] * count
    if not isinstance(continuation, (Sequence, np.ndarray, Tensor)) or isinstance(continuation, bytes):
        raise TypeError(f"continuation: expected text, token ids, or a list of these, got {continuation!r}.")
    if isinstance(continuation, (np.ndarray, Tensor)) and continuation.ndim not in (1, 2):
        raise ValueError(f"continuation: expected ids of shape (T,) or (P, T), got {tuple(continuation.shape)}.")
    if len(continuation) == 0:
        raise ValueError("continuation: empty; give at least one token.")
    first = continuation[0]
    if not isinstance(first, (str, Sequence)) and getattr(first, "ndim", 0) == 0:
        return [continuation] * count
    if len(continuation) != count:
        raise ValueError(
            f"continuation: expected one for all prompts or one per prompt ({count}), got a list of "
            f"{len(continuation)}; a prompt that has several is given several times."
        )
    return list(continuation)


def _text_ids(text: str, before: str | None, prompt: list[int], tokenizer: Any | None) -> list[int]:
    """Return the ids of ``text`` behind the ids of a ``prompt``, whose text is ``before`` where it is known."""
    if tokenizer is None:
        raise ValueError(
            f"continuation {text!r}: a tokenizer is needed, DePass(model, tokenizer). Without one, give token ids."
        )
    if not text:
        raise ValueError("continuation: empty; give at least one token.")
    check_text(text, "continuation")
    together = _together(text, before, prompt, tokenizer)
    n = len(prompt)
    if together is not None and len(together) > n and together[:n] == prompt:
        return together[n:]
    alone = _alone(text, tokenizer)
    if together is not None and together != prompt + alone:
        warn_user(
            f"continuation: prompt and {text!r} as one text are other tokens than these behind one another. The "
            "prompt's tokens stay as they are. Where a word goes on, or the prompt ends with a space, move its last "
            "characters into the continuation.",
            TokenBoundaryWarning,
        )
    return alone


def _together(text: str, before: str | None, prompt: list[int], tokenizer: Any) -> list[int] | None:
    """Return the ids of prompt and ``text`` as one text; None where the prompt's ids have no text that gives them."""
    if before is not None:
        return list(tokenizer.encode(before + text))
    decoded = tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if list(tokenizer.encode(decoded, add_special_tokens=False)) != prompt:
        return None
    return list(tokenizer.encode(decoded + text, add_special_tokens=False))


def _alone(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of ``text`` without special tokens, and without the space that SentencePiece puts in front."""
    for anchor in _ANCHORS:
        head, both = (list(tokenizer.encode(part, add_special_tokens=False)) for part in (anchor, anchor + text))
        if len(both) > len(head) and both[: len(head)] == head:
            return both[len(head) :]
    return list(tokenizer.encode(text, add_special_tokens=False))


def _listed_ids(ids: Any) -> list[int]:
    if isinstance(ids, Tensor) and ids.is_floating_point():
        raise TypeError(f"continuation: expected integer ids, got dtype {ids.dtype}.")
    return [as_index(item, "continuation") for item in ids]


def _check(ids: Sequence[int], length: int, adapter: Adapter) -> None:
    """Refuse ``ids`` behind a prompt of ``length`` tokens that the model cannot read or predict."""
    if not ids:
        raise ValueError("continuation: empty; give at least one token.")
    size, limit = min(adapter.embedding.weight.shape[0], adapter.vocabulary_size), adapter.context_length
    outside = next((i for i in ids if not 0 <= i < size), None)
    if outside is not None:
        raise ValueError(f"continuation: id {outside} is outside the vocabulary (0 to {size - 1}).")
    if limit is not None and length + len(ids) > limit:
        raise ValueError(
            f"continuation: {len(ids)} tokens after a prompt of {length} pass the model's context of {limit}."
        )
