"""Prompts: text, ids or chat messages become one vector of ids each, checked before any work."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter
from .encodings import is_encoded_batch, is_encoding, unpadded

Prompt = str | np.ndarray | Sequence[int] | Tensor | Sequence[Mapping[str, Any]] | Mapping[str, Any]


def is_batch(prompt: Any) -> bool:
    """True for several prompts: a (P, N) tensor or a tokenizer's output with P > 1, or a list of prompts."""
    if isinstance(prompt, (Tensor, np.ndarray)):
        return prompt.ndim == 2 and len(prompt) > 1
    if is_encoding(prompt):
        return is_encoded_batch(prompt)
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0 and _is_prompt(prompt[0])


def _is_prompt(item: Any) -> bool:
    if isinstance(item, (Tensor, np.ndarray)):
        return item.ndim > 0
    return isinstance(item, (str, list, tuple)) or is_encoding(item)


def encode_all(prompt: Any, adapter: Adapter, tokenizer: Any | None) -> tuple[bool, list[Tensor]]:
    """The ids (N,) of every prompt; first, True if several are given rather than one."""
    batch = is_batch(prompt)
    if is_encoding(prompt):
        prompt = unpadded(prompt)
    elif not batch:
        prompt = [prompt]
    return batch, [encode(p, adapter, tokenizer) for p in prompt]


def as_index(value: Any, argument: str) -> int:
    """An integer of any kind (Python's, NumPy's, a 0-dim tensor). Anything else is a TypeError, bool included."""
    try:
        if isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{argument}: expected an integer, got {value!r}.") from None


def as_position(position: int, length: int) -> int:
    """The position in a prompt of ``length`` tokens, counted from 0; negative ones count from the end."""
    position = as_index(position, "position")
    if not -length <= position < length:
        raise ValueError(f"position: {position} is out of range for a prompt of {length} tokens.")
    return position % length


def as_positions(position: Any, length: int) -> list[int]:
    """One position, or every one of a list, as :func:`as_position`."""
    if not is_list_of_positions(position):
        return [as_position(position, length)]
    if len(position) == 0:
        raise ValueError("position: empty; give at least one position.")
    return [as_position(one, length) for one in position]


def is_list_of_positions(position: Any) -> bool:
    """True for several positions, in a list, an array or a tensor, even if it is one of one."""
    if isinstance(position, (Tensor, np.ndarray)):
        return position.ndim > 0
    return isinstance(position, Sequence) and not isinstance(position, str)


def encode(prompt: Any, adapter: Adapter, tokenizer: Any | None) -> Tensor:
    """The ids (N,) of one prompt, a :data:`Prompt`.

    Text goes through the tokenizer with its special tokens, chat messages through its template, which adds them itself.
    The output of a tokenizer (`input_ids`, `attention_mask`) loses its padding.

    Raises:
        ValueError: empty prompt, ids outside the vocabulary, longer than the model's context, no tokenizer for text.
        TypeError: anything that is no prompt.
    """
    if is_encoding(prompt):
        if is_encoded_batch(prompt):
            raise ValueError("prompt: input_ids of one prompt are expected here, (N,) or (1, N).")
        prompt = unpadded(prompt)[0]
    if isinstance(prompt, np.ndarray):
        prompt = torch.from_numpy(prompt)
    if isinstance(prompt, str):
        ids = _text_ids(prompt, tokenizer)
    elif isinstance(prompt, Tensor):
        ids = _tensor_ids(prompt)
    elif not isinstance(prompt, Sequence):
        raise TypeError(f"prompt: expected text, token ids or chat messages, got {type(prompt).__name__}.")
    elif len(prompt) and all(isinstance(message, Mapping) for message in prompt):
        ids = _chat_ids(list(prompt), tokenizer)
    else:
        ids = _listed_ids(prompt)
    return _checked(ids, adapter)


def _text_ids(text: str, tokenizer: Any | None) -> list[int]:
    if not text:
        return []  # a BOS that the tokenizer adds by itself does not make an empty text a prompt
    return _required(tokenizer, "prompt as text").encode(text)


def _tensor_ids(ids: Tensor) -> list[int]:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"prompt: expected integer ids, got dtype {ids.dtype}.")
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise ValueError(f"prompt: expected ids of shape (N,) or (1, N), got {tuple(ids.shape)}.")
    return ids.tolist()


def _chat_ids(messages: list[Mapping[str, Any]], tokenizer: Any | None) -> list[int]:
    reader = _required(tokenizer, "prompt as chat messages")
    if not reader.chat_template:
        raise ValueError("prompt: chat messages given, but the tokenizer has no chat template; give text or ids.")
    text = reader.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return reader.encode(text, add_special_tokens=False)


def _listed_ids(ids: Sequence[Any]) -> list[int]:
    for item in ids:
        if isinstance(item, bool) or not hasattr(item, "__index__"):
            raise TypeError(f"prompt: expected text, token ids or chat messages, got a list with {item!r}.")
    return list(ids)


def _checked(ids: Sequence[int], adapter: Adapter) -> Tensor:
    """The ids as a tensor (N,), if the model can read them."""
    if len(ids) == 0:
        raise ValueError("prompt: empty; at least one token is needed.")
    limit, vocabulary = adapter.context_length, adapter.embedding.weight.shape[0]
    if limit is not None and len(ids) > limit:
        raise ValueError(f"prompt: {len(ids)} tokens, but the model's context is {limit}; shorten the prompt.")
    tensor = torch.tensor([int(i) for i in ids], dtype=torch.long, device="cpu")
    outside = tensor[(tensor < 0) | (tensor >= vocabulary)]
    if len(outside):
        raise ValueError(f"prompt: id {int(outside[0])} is outside the vocabulary (0 to {vocabulary - 1}).")
    return tensor


def token_texts(ids: Tensor, tokenizer: Any | None) -> list[str]:
    """The text of every token; its number where there is no tokenizer."""
    if tokenizer is None:
        return [str(i) for i in ids.tolist()]
    return [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids.tolist()]


def single_token(text: str, tokenizer: Any | None, argument: str = "target") -> int:
    """The id of a text that is a single token.

    Raises:
        ValueError: it is several tokens (the message names them), or none.
    """
    reader = _required(tokenizer, f"{argument} {text!r}")
    ids = reader.encode(text, add_special_tokens=False)
    if not text:
        raise ValueError(f"{argument}: empty string; give one token, or None for the model's own next token.")
    if len(ids) == 1 and ids[0] == reader.unk_token_id and text != reader.unk_token:
        raise ValueError(f"{argument}: {text!r} is not in the tokenizer's vocabulary.")
    if len(ids) != 1:
        parts = ", ".join(
            f"{t!r} ({i})" for t, i in zip(token_texts(torch.tensor(ids, device="cpu"), tokenizer), ids, strict=True)
        )
        more = " Several tokens are given as continuation=." if argument == "target" and len(ids) > 1 else ""
        hint = "" if text.startswith(" ") else f" Most words need a leading space: {' ' + text!r}."
        raise ValueError(f"{argument}: {text!r} is {len(ids)} tokens: [{parts}]; one is needed.{hint}{more}")
    return ids[0]


def _required(tokenizer: Any | None, argument: str) -> Any:
    if tokenizer is None:
        raise ValueError(f"{argument}: a tokenizer is needed, DePass(model, tokenizer). Without one, give token ids.")
    return tokenizer
