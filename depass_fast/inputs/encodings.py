"""The output of a tokenizer, `input_ids` with an `attention_mask`, as prompts without their padding.

Padding is dropped: it is no position of the model, no component, no label. The forward pass packs prompts of different
lengths without any (:mod:`depass_fast.trace.capture`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# entries that tokenizers and collators add, and that the forward pass of a language model does not read
_ABOUT_THE_TEXT = {
    "assistant_masks",
    "labels",
    "length",
    "num_truncated_tokens",
    "offset_mapping",
    "overflow_to_sample_mapping",
    "overflowing_tokens",
    "special_tokens_mask",
}
_KINDS_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")  # 0: text


def is_encoding(prompt: Any) -> bool:
    """True for the output of a tokenizer: a mapping with ids, not a chat message."""
    return isinstance(prompt, Mapping) and "input_ids" in prompt


def is_encoded_batch(encoding: Mapping[str, Any]) -> bool:
    """True if several prompts are encoded. One row is one prompt, and so are ids without an axis for the batch."""
    return len(_rows(encoding["input_ids"], "input_ids")) != 1


def unpadded(encoding: Mapping[str, Any]) -> list[Tensor]:
    """The ids (N,) of every prompt: those where the mask is 1.

    Args:
        encoding: ``input_ids`` (B, N) or (N,) as a tensor, an array or lists. If there is padding, also an
            ``attention_mask`` of the same shape: ones, with zeros on one or both sides.

    Raises:
        ValueError: the mask has another shape, other values, zeros between ones, or no ones; or there are inputs that
            the decomposition would leave out.
    """
    _refuse_other_inputs(encoding)
    rows = _rows(encoding["input_ids"], "input_ids")
    if not rows:
        raise ValueError("prompt: input_ids holds no prompts.")
    if encoding.get("attention_mask") is None:
        return rows
    masks = _rows(encoding["attention_mask"], "attention_mask")
    shapes = [[len(row) for row in x] for x in (rows, masks)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"prompt: attention_mask must have the shape of input_ids; their rows are {shapes[1]} and {shapes[0]} long."
        )
    return [ids[_real(mask, row)] for row, (ids, mask) in enumerate(zip(rows, masks, strict=True))]


def _rows(x: Any, name: str) -> list[Tensor]:
    """One tensor per prompt."""
    if isinstance(x, (Tensor, np.ndarray)):
        if x.ndim not in (1, 2):
            raise ValueError(f"prompt: expected {name} of shape (B, N) or (N,), got {tuple(x.shape)}.")
        x = torch.as_tensor(x, device="cpu")
        return list(x) if x.ndim == 2 else [x]
    nested = len(x) == 0 or not hasattr(x[0], "__index__")
    return [
        torch.as_tensor(row, device="cpu") if len(row) else torch.zeros(0, dtype=torch.long, device="cpu")
        for row in (x if nested else [x])
    ]


def _real(mask: Tensor, row: int) -> slice:
    """The positions of one prompt without its padding."""
    where = f"prompt: attention_mask of row {row}"
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{where}: expected 0 for padding and 1 for tokens, got other values.")
    ones = mask.nonzero().flatten()
    if not len(ones):
        raise ValueError(f"{where}: all padding; at least one token is needed.")
    first, last = int(ones[0]), int(ones[-1])
    if last + 1 - first != len(ones):
        raise ValueError(
            f"{where}: zeros between ones (at {first + int((mask[first:last] == 0).nonzero()[0])}); only padding at "
            "the sides can be dropped."
        )
    return slice(first, last + 1)


def _refuse_other_inputs(encoding: Mapping[str, Any]) -> None:
    """Raise ValueError for an entry that would change the forward pass, and that no decomposition takes account of."""
    for name, value in encoding.items():
        if value is None or name in _ABOUT_THE_TEXT or name in ("input_ids", "attention_mask"):
            continue
        if name in _KINDS_OF_TOKENS and not any(row.any() for row in _rows(value, name)):
            continue  # a single kind of text, as without this entry
        if isinstance(value, str) or (isinstance(value, Sequence) and value and isinstance(value[0], str)):
            continue  # a column of a data set, such as the text itself
        raise ValueError(
            f"prompt: {name} is an input that a decomposition would leave out; give input_ids and attention_mask only."
        )
