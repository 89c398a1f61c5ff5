"""The interface that results of one layer and of several share: what is read, drawn and saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .estimate import Estimate
from .provenance import Provenance
from .verification import Verification


@dataclass(frozen=True)
class Row:
    """A row of a table. Components are ``ranked`` and have a bar; `others`, `rest`, `bias` and the sum are not."""

    label: str
    score: float
    ranked: bool = True


class Result(Protocol):
    """Scores of labelled components in the logits of one prompt, and how they came about.

    :class:`depass_fast.Attribution` is the result of one layer, :class:`depass_fast.LayeredAttribution` of several.
    """

    @property
    def labels(self) -> list[str]: ...

    @property
    def scores(self) -> Tensor: ...

    @property
    def target_logits(self) -> Tensor: ...

    @property
    def target_names(self) -> list[str]: ...

    @property
    def target_ids(self) -> list[int | None]: ...

    @property
    def contrast_ids(self) -> list[int | None]: ...

    @property
    def target_kinds(self) -> list[str] | None: ...

    @property
    def input_ids(self) -> list[int]: ...

    @property
    def tokens(self) -> list[str]: ...

    @property
    def components(self) -> str: ...

    @property
    def position(self) -> int: ...

    @property
    def allocation(self) -> str: ...

    @property
    def temperature(self) -> float: ...

    @property
    def backend(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def method(self) -> str: ...

    @property
    def is_exact(self) -> bool: ...

    @property
    def written_at(self) -> list[int] | None: ...

    @property
    def value_activation(self) -> str | None: ...
    @property
    def exclude_special(self) -> list[int] | None: ...

    @property
    def state_dtype(self) -> str | None: ...

    @property
    def compute_dtype(self) -> str | None: ...

    @property
    def reduced(self) -> dict[str, Any] | None: ...

    @property
    def end(self) -> int | None: ...

    @property
    def provenance(self) -> Provenance | None: ...

    @property
    def memory_budget(self) -> int | None: ...

    @property
    def seconds(self) -> float: ...

    @property
    def completeness_error(self) -> float: ...

    @property
    def estimate(self) -> Estimate | None: ...

    @property
    def warnings(self) -> list[str] | None: ...

    @property
    def verification(self) -> Verification | None: ...

    def layer_text(self) -> str:
        """Return the layer or layers in words."""
        ...

    def scores_of(self, target: int) -> Tensor:
        """Return the scores of one target in the order of ``labels``: (M,)."""
        ...

    def rows(self, target: int, top: int) -> list[Row]:
        """Return the ``top`` leading components of a target and what belongs under them."""
        ...

    def top(self, k: int = 10, target: int = 0, by: str = "magnitude") -> list[tuple[str, float]]:
        """Return the ``k`` leading components as (label, score)."""
        ...

    def score(self, label: str, target: int = 0) -> float:
        """Return the score of one component by its label."""
        ...

    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose header carries everything else as JSON."""
        ...

    def to_csv(self, path: str | Path) -> None:
        """Write a table with a row per component."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values."""
        ...
