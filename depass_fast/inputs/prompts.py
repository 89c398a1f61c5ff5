"""Prompts: text, ids or chat messages become one vector of ids each, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter
from ..runtime.numbers import as_index
from .chat import chat_ids
from .doubts import doubt_end, doubt_padding, doubt_start
from .encodings import is_encoded_batch, is_encoding, unpadded
from .text import check_text

Prompt = str | np.ndarray | Sequence[int] | Tensor | Sequence[Mapping[str, Any]] | Mapping[str, Any]
# what type checkers tell apart: prompts that are one or several whatever they hold
OnePrompt: TypeAlias = str | Sequence[int] | list[dict[str, str]]
SeveralPrompts: TypeAlias = list[str] | list[list[int]] | list[list[dict[str, str]]]
POSITIONS = "an integer, or a list of integers"  # what a position may be


def is_batch(prompt: Any) -> bool:
    """True for several prompts: a (P, N) tensor or a tokenizer's output with P > 1, or a list of prompts."""
    prompt = _texts(prompt)
    if isinstance(prompt, (Tensor, np.ndarray)):
        return prompt.ndim == 2 and len(prompt) > 1
    if is_encoding(prompt):
        return is_encoded_batch(prompt)
    listed = isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes, bytearray))
    return listed and len(prompt) > 0 and _is_prompt(prompt[0])


def _is_prompt(item: Any) -> bool:
    item = _texts(item)
    if isinstance(item, (Tensor, np.ndarray)):
        return item.ndim > 0
    return isinstance(item, (str, bytes, list, tuple)) or is_encoding(item)


def _texts(prompt: Any) -> Any:
    """An array of strings or of Python objects as a list (a string, if it has no axis); anything else as it is."""
    return prompt.tolist() if isinstance(prompt, np.ndarray) and prompt.dtype.kind in "OSTU" else prompt


def encode_all(
    prompt: Any, adapter: Adapter, tokenizer: Any | None, template_kwargs: Mapping[str, Any] | None = None
) -> tuple[bool, list[Tensor]]:
    """The ids (N,) of every prompt; first, True if several are given rather than one. Arguments as :func:`encode`."""
    batch = is_batch(prompt)
    if is_encoding(prompt):
        return batch, _encoded(prompt, adapter, tokenizer)
    return batch, [encode(p, adapter, tokenizer, template_kwargs) for p in (_texts(prompt) if batch else [prompt])]


def as_position(position: int, length: int, argument: str = "position") -> int:
    """The position in a prompt of ``length`` tokens, counted from 0; negative ones count from the end."""
    position = as_index(position, argument, POSITIONS)
    if not -length <= position < length:
        raise ValueError(f"{argument}: {position} is out of range for a prompt of {length} tokens.")
    return position % length


def as_positions(position: Any, length: int, argument: str = "position") -> list[int]:
    """One position, or every one of a list, as :func:`as_position`."""
    if not is_list_of_positions(position):
        return [as_position(position, length, argument)]
    if len(position) == 0:
        raise ValueError(f"{argument}: empty; give at least one position.")
    return [as_position(one, length, argument) for one in position]


def is_list_of_positions(position: Any) -> bool:
    """True for several positions, in a list, an array or a tensor, even if it is one of one."""
    if isinstance(position, (Tensor, np.ndarray)):
        return position.ndim > 0
    return isinstance(position, Sequence) and not isinstance(position, str)


def encode(
    prompt: Any, adapter: Adapter, tokenizer: Any | None, template_kwargs: Mapping[str, Any] | None = None
) -> Tensor:
    """The ids (N,) of one prompt, a :data:`Prompt`.

    Text goes through the tokenizer with its special tokens. Chat messages go through its template, which adds them
    itself and reads ``template_kwargs``; a last message of the assistant's is continued. The output of a tokenizer
    (`input_ids`, `attention_mask`) loses its padding.

    Raises:
        ValueError: empty prompt, ids outside the vocabulary, longer than the model's context, no tokenizer for text.
        TypeError: anything that is no prompt.
    """
    prompt = _texts(prompt)
    if is_encoding(prompt):
        if is_encoded_batch(prompt):
            raise ValueError("prompt: input_ids of one prompt are expected here, (N,) or (1, N).")
        return _encoded(prompt, adapter, tokenizer)[0]
    if isinstance(prompt, str):
        ids = _text_ids(prompt, tokenizer)
    elif isinstance(prompt, Sequence) and len(prompt) and all(isinstance(message, Mapping) for message in prompt):
        ids = chat_ids(prompt, required(tokenizer, "prompt as chat messages"), template_kwargs)
        doubt_start(ids, tokenizer, "The tokenizer's chat template adds one too many; give ids without it.")
    else:
        ids = _given_ids(prompt)
        doubt_padding(ids, tokenizer)
        doubt_start(ids, tokenizer, _ONE_BOS)
    return _checked(ids, adapter)


_ONE_BOS = "Give ids with one: tokenizer(text, add_special_tokens=False) where the text has its own."


def _encoded(encoding: Mapping[str, Any], adapter: Adapter, tokenizer: Any | None) -> list[Tensor]:
    """The ids (N,) of every prompt in a tokenizer's output."""
    rows = [_given_ids(ids) for ids in unpadded(encoding)]
    for ids in rows:
        if encoding.get("attention_mask") is None:
            doubt_padding(ids, tokenizer)
        doubt_start(ids, tokenizer, _ONE_BOS)
    return [_checked(ids, adapter) for ids in rows]


def _text_ids(text: str, tokenizer: Any | None) -> list[int]:
    if not text:
        return []  # a BOS that the tokenizer adds by itself does not make an empty text a prompt
    check_text(text, "prompt")
    ids = required(tokenizer, "prompt as text").encode(text)
    doubt_start(ids, tokenizer, "The text has one, and the tokenizer adds one: leave it out of the text.")
    doubt_end(text, ids, tokenizer)
    return ids


def _given_ids(prompt: Any) -> list[int]:
    """Ids in a tensor, an array or a list, as a list."""
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise TypeError("prompt: expected text, got bytes; decode them first: prompt.decode('utf-8').")
    if isinstance(prompt, np.ndarray):
        prompt = torch.from_numpy(prompt)
    if isinstance(prompt, Tensor):
        return _tensor_ids(prompt)
    if isinstance(prompt, Sequence):
        return _listed_ids(prompt)
    advice = "; give prompt.tolist()" if hasattr(prompt, "tolist") else ""
    if isinstance(prompt, Mapping) and "role" in prompt:
        advice = "; give one message in a list, [message]"
    raise TypeError(f"prompt: expected text, token ids or chat messages, got {type(prompt).__name__}{advice}.")


def _tensor_ids(ids: Tensor) -> list[int]:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"prompt: expected integer ids, got dtype {ids.dtype}.")
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise ValueError(f"prompt: expected ids of shape (N,) or (1, N), got {tuple(ids.shape)}.")
    return ids.tolist()


def _listed_ids(ids: Sequence[Any]) -> list[int]:
    for item in ids:
        if isinstance(item, bool) or not hasattr(item, "__index__"):
            raise TypeError(f"prompt: expected text, token ids or chat messages, got a list with {item!r}.")
    return [int(i) for i in ids]


def _checked(ids: Sequence[int], adapter: Adapter) -> Tensor:
    """The ids as a tensor (N,), if the model can read them."""
    if len(ids) == 0:
        raise ValueError("prompt: empty; at least one token is needed.")
    limit, vocabulary = adapter.context_length, adapter.embedding.weight.shape[0]
    if limit is not None and len(ids) > limit:
        raise ValueError(f"prompt: {len(ids)} tokens, but the model's context is {limit}; shorten the prompt.")
    tensor = torch.tensor(ids, dtype=torch.long, device="cpu")
    outside = tensor[(tensor < 0) | (tensor >= vocabulary)]
    if len(outside):
        raise ValueError(f"prompt: id {int(outside[0])} is outside the vocabulary (0 to {vocabulary - 1}).")
    return tensor


def required(tokenizer: Any | None, argument: str) -> Any:
    if tokenizer is None:
        raise ValueError(f"{argument}: a tokenizer is needed, DePass(model, tokenizer). Without one, give token ids.")
    return tokenizer
