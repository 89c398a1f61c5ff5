"""The interface of attention's results: what is drawn of them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class _Made(Protocol):
    """Fields that say how a result came about."""

    labels: list[str]
    tokens: list[str]
    components: str
    allocation: str
    backend: str
    device: str
    dtype: str
    completeness_error: float
    seconds: float
    warnings: list[str] | None


class Explanation(_Made, Protocol):
    """The shares of components in attention logits, see :class:`depass_fast.AttentionExplanation`."""

    scores: Tensor
    probabilities: Tensor
    entropy: Tensor
    layer: int
    heads: list[int]
    query: int
    keys: list[int]
    start: int
    one_head: bool
    asked: str

    @property
    def shares(self) -> Tensor: ...


class Credit(_Made, Protocol):
    """The shares of components in what a target owes to attention, see :class:`depass_fast.AttentionCredit`."""

    target_logits: Tensor
    target_names: list[str]
    target_kinds: list[str]
    layers: list[int]
    layer: int
    position: int
    rule: str

    def total(self, target: int = 0) -> Tensor:
        """Return the credit of every component over all layers and heads: (M,)."""
        ...

    def top(self, k: int = 10, target: int = 0, by: str = "magnitude") -> list[tuple[str, float]]:
        """Return the leading components."""
        ...

    def top_heads(self, k: int = 10, target: int = 0, by: str = "magnitude") -> list[tuple[str, float]]:
        """Return the leading heads."""
        ...
