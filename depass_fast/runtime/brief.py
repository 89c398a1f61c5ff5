"""Short representations: tensors as their shapes, long texts and collections cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import fields
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor, nn

from .dtypes import dtype_name
from .terminal import encodable

_LONGEST = 2000  # characters of a representation
_VALUE = 160  # characters of one value in it
_ITEMS = 4  # of a collection


def brief_repr(self: Any) -> str:
    """Return the ``__repr__`` of a dataclass: every field that its own would show, in 2,000 characters at most."""
    shown = (f"{field.name}={brief(getattr(self, field.name))}" for field in fields(self) if field.repr)
    return encodable(cut(f"{type(self).__name__}({', '.join(shown)})", _LONGEST))


def brief(value: Any) -> str:
    """Return a value in a few words: the shape of a tensor, the first items of a collection and their number."""
    if isinstance(value, Tensor):
        return f"<{dtype_name(value.dtype)} tensor {tuple(value.shape)} on {value.device}>"
    if isinstance(value, np.ndarray):
        return f"<{value.dtype} array {value.shape}>"
    if isinstance(value, nn.Module):
        return f"<{type(value).__name__}>"
    if isinstance(value, Mapping):
        return _several([f"{brief(k)}: {brief(v)}" for k, v in islice(value.items(), _ITEMS)], len(value), "{}")
    if isinstance(value, Sequence | Set) and not isinstance(value, str | bytes):
        brackets = "[]" if isinstance(value, list) else "()" if isinstance(value, Sequence) else "{}"
        return _several([brief(item) for item in islice(value, _ITEMS)], len(value), brackets)
    return cut(repr(value), _VALUE)


def cut(text: str, length: int) -> str:
    """Return a text of at most ``length`` characters; what is too much is left out before its end."""
    if len(text) <= length:
        return text
    kept = length - 5
    return f"{text[: kept - kept // 4]} ... {text[len(text) - kept // 4 :]}"


def _several(items: list[str], count: int, brackets: str) -> str:
    more = f", ... {count} in all" if count > len(items) else "," if brackets == "()" and count == 1 else ""
    return cut(f"{brackets[0]}{', '.join(items)}{more}{brackets[1]}", _VALUE)
