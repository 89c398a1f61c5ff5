"""The credit of looking: what a target owes to where heads look, for every component and head by head."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.numbers import as_index
from ..runtime.terminal import encodable
from .attention_pages import CreditPage
from .attention_view import CreditView, plain_credit
from .drawn import DrawnCredit
from .files import known_fields, read_result, register_format, write_result
from .parts import parts_of, plain_values
from .provenance import Provenance
from .ranking import leading
from .tables import data_frame, write_csv
from .verification import Verification

if TYPE_CHECKING:
    import pandas

FORMAT = "depass_fast.attention_credit.v1"
TENSORS = ("scores", "changes", "target_logits")


@dataclass(eq=False)
class AttentionCredit(DrawnCredit, CreditPage):
    """The part of a target's logit that comes from attending *there* instead of evenly, split over components.

    Shapes are those of a single target; with a list of targets, ``scores``, ``changes`` and ``target_logits`` have them
    as their first axis (T, ...).

    ``changes`` (L, H) are, for each of the L ``layers`` and each head, what the head adds to the target minus what it
    would add if it looked evenly at all that it sees, at all queries together; the way from the head to the target is
    linear, under ``rule``. ``scores`` (L, H, M) share that out over the components, in the order of ``labels``; they
    sum to ``changes`` (DESIGN.md section 9). It is a second book beside the shares of
    :meth:`depass_fast.DePass.attribute`: those say what heads carried, this one where they looked.

    ``layers`` are those whose attention the components reach. ``completeness_error`` is the largest of
    |Σ_m score - change| over heads, relative to the Σ |score| of the head and the largest change of its layer, and of
    ``layer_errors``, those of the states as in :class:`depass_fast.Attribution`.
    """

    scores: Tensor
    changes: Tensor
    target_logits: Tensor
    labels: list[str]
    layers: list[int]
    rule: str
    completeness_error: float
    layer_errors: list[float]
    target_names: list[str]
    target_ids: list[int | None]
    contrast_ids: list[int | None]
    target_kinds: list[str]
    input_ids: list[int]
    tokens: list[str]
    position: int
    components: str
    layer: int
    allocation: str
    temperature: float
    backend: str
    device: str
    dtype: str
    state_dtype: str
    compute_dtype: str
    seconds: float
    site: str | None = None
    exclude_special: list[int] | None = None
    verification: Verification | None = None
    warnings: list[str] | None = None
    provenance: Provenance | None = None
    unknown: dict[str, Any] = field(default_factory=dict, repr=False)

    def total(self, target: int = 0) -> Tensor:
        """Return the credit of every component over all layers and heads: (M,)."""
        return self._of(self.scores, target).sum((0, 1))

    def of_head(self, layer: int, head: int, target: int = 0) -> Tensor:
        """Return the credit of every component for one head's looking: (M,). Raises ValueError if there is none."""
        number = as_index(layer, "layer")
        number += self.layers[-1] + 1 if number < 0 else 0
        if number not in self.layers:
            raise ValueError(f"layer: {layer} is not among {self.layers}, which these components reach.")
        scores = self._of(self.scores, target)
        if not -scores.shape[1] <= as_index(head, "head") < scores.shape[1]:
            raise ValueError(f"head: {head} is out of range; a layer has {scores.shape[1]} heads.")
        return scores[self.layers.index(number), head]

    def top(
        self,
        k: int = 10,
        target: int = 0,
        by: str = "magnitude",
        *,
        layer: int | None = None,
        head: int | None = None,
    ) -> list[tuple[str, float]]:
        """Return the ``k`` leading components as (label, credit), over all heads or of the one at ``layer``.

        ``by`` is "magnitude", "positive" or "negative". Raises ValueError for a layer without a head, or the other way.
        """
        if (layer is None) != (head is None):
            raise ValueError("top: give layer and head together, or none of the two for all heads.")
        scores = self.total(target) if layer is None or head is None else self.of_head(layer, head, target)
        return leading(self.labels, scores, k, by)

    def top_heads(self, k: int = 10, target: int = 0, by: str = "magnitude") -> list[tuple[str, float]]:
        """Return the ``k`` heads whose looking changes the target most, as (label, change); `L9H6`: layer 9, head 6."""
        changes = self._of(self.changes, target)
        labels = [f"L{layer}H{head}" for layer in self.layers for head in range(changes.shape[1])]
        return leading(labels, changes.flatten(), k, by)

    def _of(self, x: Tensor, target: int) -> Tensor:
        """Return one target's part. Raises IndexError where there is none."""
        if not -len(self.target_names) <= as_index(target, "target") < len(self.target_names):
            raise IndexError(f"target: {target} is out of range; this result holds {len(self.target_names)}.")
        return x[target] if self.target_logits.ndim else x

    def __str__(self) -> str:
        return plain_credit(self)

    def __rich__(self) -> CreditView:
        return CreditView(self)

    def __repr__(self) -> str:
        leading_ones = ", ".join(f"{label} {score:+.4g}" for label, score in self.top(3))
        return encodable(
            f"AttentionCredit({', '.join(self.target_names[:3])}; layers {self.layers[0]} to {self.layers[-1]}, "
            f"{self.components}; leading: {leading_ones}; completeness error {self.completeness_error:.1e})"
        )

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Return the names and the rows of a table: a row per target, layer, head and component."""
        scores = self.scores if self.target_logits.ndim else self.scores[None]
        rows = [
            [name, layer, head, label, value]
            for name, of_target in zip(self.target_names, scores.tolist(), strict=True)
            for layer, of_layer in zip(self.layers, of_target, strict=True)
            for head, of_head in enumerate(of_layer)
            for label, value in zip(self.labels, of_head, strict=True)
        ]
        return ["target", "layer", "head", "label", "credit"], rows

    def to_dataframe(self) -> pandas.DataFrame:
        """Return a DataFrame with a row per target, layer, head and component. Needs pandas."""
        return data_frame(*self.table(), self._plain())

    def to_csv(self, path: str | Path) -> None:
        """Write a table with a row per target, layer, head and component."""
        write_csv(path, *self.table())

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values."""
        return self._plain() | {name: getattr(self, name).tolist() for name in TENSORS}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose header carries everything else as JSON. Nothing is pickled."""
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        write_result(path, FORMAT, tensors, self._plain() | self.unknown)

    @classmethod
    def load(cls, path: str | Path) -> AttentionCredit:
        """Read a file of :meth:`save`. Raises ValueError for any other file."""
        return read_result(path, FORMAT)

    @staticmethod
    def restore(tensors: dict[str, Tensor], content: dict[str, Any]) -> AttentionCredit:
        """Return the result that a file holds."""
        known, unknown = known_fields(AttentionCredit, content)
        parts = parts_of(known)
        return AttentionCredit(**tensors, **known, **parts, unknown=unknown)

    def _plain(self) -> dict[str, Any]:
        return plain_values(self, [one.name for one in fields(self) if one.name not in (*TENSORS, "unknown")])


def credit_error(scores: Tensor, changes: Tensor) -> float:
    """Return the largest |Σ_m score - change| of scores (T, L, H, M), relative to its head and its layer."""
    sizes = scores.abs().sum(-1) + changes.abs().amax(-1, keepdim=True)
    off = (scores.sum(-1) - changes).abs() / sizes.clamp_min(torch.finfo(scores.dtype).tiny)
    return float(off.max())


register_format(FORMAT, AttentionCredit.restore)
