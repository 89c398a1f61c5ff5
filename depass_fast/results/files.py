"""Result files: safetensors with a JSON header, and CSV tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

if TYPE_CHECKING:
    pass


def write_csv(path: str | Path, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table with a head."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)


def open_saved(path: str | Path, *formats: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the rest of a saved result. Raises ValueError where the file is none of these ``formats``."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error
    if metadata.get("format") not in formats:
        raise ValueError(f"{path}: not a saved attribution (format {metadata.get('format')!r}, not {formats[0]!r})")
    return tensors, json.loads(metadata["json"])
