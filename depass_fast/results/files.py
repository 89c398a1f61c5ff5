"""Result files: safetensors whose header carries everything else as JSON. Every kind of result registers its format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Restore = Callable[[dict[str, Tensor], dict[str, Any]], Any]

_RESTORE: dict[str, Restore] = {}


def register_format(name: str, restore: Restore) -> None:
    """Say how the files of a format become results: ``restore(tensors, content)``."""
    _RESTORE[name] = restore


def write_result(path: str | Path, name: str, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Write ``tensors`` and plain ``content`` as a file of the format ``name``. Nothing is pickled."""
    save_file(tensors, str(path), metadata={"format": name, "json": json.dumps(content)})


def read_result(path: str | Path, name: str | None = None) -> Any:
    """Read a file of the format ``name``, by default of any registered format.

    Raises:
        ValueError: the file has another format, or is not a safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error
    found, known = metadata.get("format"), list(_RESTORE) if name is None else [name]
    if found not in known:
        raise ValueError(f"{path}: not a saved attribution (format {found!r}, not {' or '.join(map(repr, known))})")
    return _RESTORE[found](tensors, json.loads(metadata["json"]))
