"""Dense files: the scores of a shard as one vector, every result of which is a slice (safetensors)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .outcomes import Outcome

FORMAT = "depass_fast.sweep_scores.v1"


class DenseScores(NamedTuple):
    """The scores of one prompt at one position of one layer: (M,), or (K, M) for K targets, with their labels (M,)."""

    prompt: str
    position: int
    layer: int
    targets: list[str]
    labels: list[str]
    scores: Tensor


@dataclass
class Dense:
    """The scores of results until they are written. Labels that several results share are kept once."""

    _scores: list[Tensor] = field(default_factory=list)
    _entries: list[dict[str, Any]] = field(default_factory=list)
    _labels: list[list[str]] = field(default_factory=list)
    _known: dict[tuple[str, ...], int] = field(default_factory=dict)
    _text: int = 0  # bytes of labels: they lie in the file's head, which may have 100 MB

    def add(self, outcome: Outcome) -> None:
        """Take in the results of a prompt."""
        for result in outcome.results:
            for one in result.by_layer if hasattr(result, "by_layer") else [result]:
                key = tuple(one.labels)
                if key not in self._known:
                    self._known[key] = len(self._labels)
                    self._labels.append(list(one.labels))
                    self._text += sum(len(json.dumps(label)) + 2 for label in one.labels)
                self._scores.append(one.scores.contiguous())
                about = {"prompt": outcome.id, "position": one.position, "layer": one.layer}
                shape, targets = list(one.scores.shape), list(one.target_names)
                self._entries.append(about | {"targets": targets, "labels": self._known[key], "shape": shape})

    @property
    def nbytes(self) -> int:
        """The bytes that the scores and their labels take."""
        return sum(one.numel() * one.element_size() for one in self._scores) + self._text

    def write(self, path: Path) -> None:
        """Write the file. Nothing is pickled."""
        wide = torch.float64 if any(one.dtype == torch.float64 for one in self._scores) else torch.float32
        scores = torch.cat([one.flatten().to(wide) for one in self._scores])
        about = {"entries": self._entries, "labels": self._labels}
        save_file({"scores": scores}, str(path), metadata={"format": FORMAT, "json": json.dumps(about)})


def read_dense(paths: Sequence[Path]) -> Iterator[DenseScores]:
    """Yield the scores that dense files hold, one after the other; a file at a time is in memory.

    Raises:
        ValueError: a file is damaged.
    """
    for path in paths:
        try:
            with safe_open(str(path), framework="pt") as file:
                about, scores = json.loads((file.metadata() or {})["json"]), file.get_tensor("scores")
            first = 0
            for one in about["entries"]:
                count = torch.Size(one["shape"]).numel()
                part, first = scores[first : first + count].view(one["shape"]), first + count
                labels = about["labels"][one["labels"]]
                yield DenseScores(one["prompt"], one["position"], one["layer"], one["targets"], labels, part)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged ({type(error).__name__}: {error}).") from error
