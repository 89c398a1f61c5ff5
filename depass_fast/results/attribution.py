"""The result of an attribution: scores with aligned labels, their measured error, and how they came about."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..labels import BIAS, REST
from .verification import Verification

if TYPE_CHECKING:
    import pandas

    from .layered import LayeredAttribution
from .files import open_saved, write_csv
from .ranking import check_top, ranking

_FORMAT = "depass_fast.attribution.v1"
TENSORS = ("scores", "target_logits", "layer_errors")


@dataclass(eq=False)
class Attribution:
    """The share of every component in the target's logit.

    ``scores`` (M,), or (K, M) for a list of K targets, in the order of ``labels``: tokens, heads or neurons in their
    natural order, then `rest` and `bias` where they exist. ``target_logits`` () or (K,) are the model's own; they
    equal the sum of the scores up to ``completeness_error``.

    ``completeness_error`` is the largest of |Σ_m score - logit| / Σ_m |score|, over the targets, and of
    ``layer_errors``: max_n ‖Σ_m X[n, m] - x[n]‖ / ‖x[n]‖, at the start and after every layer passed.

    ``method`` says how the scores were computed: "exact", or "adjoint" (approximate; it passes no states, so there are
    no ``layer_errors``). An approximate result holds an ``estimate`` of its error where a sample was drawn
    (:class:`depass_fast.adjoint.estimate.Estimate`), and ``warnings`` where it is not to be relied upon.

    ``verification`` is what ``verify=True`` found (:class:`depass_fast.Verification`), in all prompts of the call;
    where it failed, ``warnings`` says so.
    """

    scores: Tensor
    labels: list[str]
    target_logits: Tensor
    completeness_error: float
    layer_errors: Tensor
    target_names: list[str]
    target_ids: list[int | None]
    contrast_ids: list[int | None]
    input_ids: list[int]
    tokens: list[str]
    components: str
    layer: int
    position: int
    allocation: str
    temperature: float
    backend: str
    device: str
    dtype: str
    seconds: float
    method: str = "exact"
    estimate: dict[str, Any] | None = None
    warnings: list[str] | None = None
    memory_budget: int | None = None  # bytes of workspace that were used in the end; None: not bounded
    verification: Verification | None = None

    def top(self, k: int = 10, target: int = 0, by: str = "magnitude", extras: bool = False) -> list[tuple[str, float]]:
        """The ``k`` leading components as (label, score): ``by`` "magnitude", "positive" (largest) or "negative".

        `rest` and `bias` are left out unless ``extras``: what is not decomposed is not ranked with what is.
        """
        check_top(k, by)
        scores = self._of(target)
        if not extras:
            scores = scores[: len(self.labels) - self.n_extras]
        order = ranking(scores, by)[:k].tolist()
        return [(self.labels[i], float(scores[i])) for i in order]

    @property
    def n_extras(self) -> int:
        """How many of the last labels are `rest` and `bias`, which no component kind names so itself."""
        return sum(label in (REST, BIAS) for label in self.labels[-2:])

    def score(self, label: str, target: int = 0) -> float:
        """The score of one component by its label."""
        try:
            return float(self._of(target)[self.labels.index(label)])
        except ValueError:
            span = f"{self.labels[0]!r} to {self.labels[-1]!r}"
            raise KeyError(f"no component {label!r}; labels run from {span}") from None

    def to_dataframe(self) -> pandas.DataFrame:
        """A DataFrame with a row per component: `label`, and a column of scores per target. Needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_dataframe needs pandas: pip install 'depass-fast[pandas]'") from error
        names, columns = self.columns()
        return pandas.DataFrame(list(zip(*columns, strict=True)), columns=names)

    def to_circuitsvis(self, target: int = 0) -> dict[str, list]:
        """The arguments of `circuitsvis.tokens.colored_tokens`: the prompt's tokens and their scores, without `bias`.

        Raises:
            ValueError: the components are no tokens.
        """
        if self.components != "tokens":
            raise ValueError(f"to_circuitsvis: it colours the prompt, whose tokens these {self.components} are not.")
        return {"tokens": list(self.tokens), "values": self._of(target)[: len(self.tokens)].tolist()}

    def to_csv(self, path: str | Path) -> None:
        """Write a table with a row per component: `label`, and a column of scores per target."""
        names, columns = self.columns()
        write_csv(path, names, zip(*columns, strict=True))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose header carries everything else as JSON. Nothing is pickled."""
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        save_file(tensors, str(path), metadata={"format": _FORMAT, "json": json.dumps(self.metadata())})

    @classmethod
    def load(cls, path: str | Path) -> Attribution | LayeredAttribution:
        """Read what :meth:`save` wrote, also that of :class:`depass_fast.LayeredAttribution`.

        Raises:
            ValueError: the file is no saved attribution.
        """
        from .layered import FORMAT, LayeredAttribution

        tensors, content = open_saved(path, _FORMAT, FORMAT)
        return LayeredAttribution.restore(tensors, content) if "layers" in content else cls.restore(tensors, content)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values under the names that ``depass-fast attribute --json`` prints."""
        scores = self.scores.tolist()
        single = self.scores.ndim == 1
        return {
            "input_ids": self.input_ids,
            "components": self.components,
            "layer": self.layer,
            "labels": self.labels,
            "scores": scores,
            "target_id": self.target_ids[0] if single else self.target_ids,
            "contrast_id": self.contrast_ids[0] if single else self.contrast_ids,
            "target": self.target_names[0] if single else self.target_names,
            "target_logit": self.target_logits.tolist(),
            "position": self.position,
            "completeness_error": self.completeness_error,
            "allocation": self.allocation,
            "temperature": self.temperature,
            "backend": self.backend,
            "device": self.device,
            "dtype": self.dtype,
            "seconds": self.seconds,
            "method": self.method,
            "estimate": self.estimate,
            "warnings": self.warnings or [],
            "memory_budget": self.memory_budget,
            "verification": None if self.verification is None else asdict(self.verification),
        }

    def __str__(self) -> str:
        from .render import plain

        return plain(self)

    def __rich__(self) -> Any:
        from .render import rich_view

        return rich_view(self)

    def _of(self, target: int) -> Tensor:
        scores = torch.atleast_2d(self.scores)
        if not -len(scores) <= target < len(scores):
            raise IndexError(f"target: {target} is out of range; this result holds {len(scores)}.")
        return scores[target]

    def columns(self) -> tuple[list[str], list[list]]:
        """Names and values of a table's columns: the labels, then the scores of every target."""
        if self.scores.ndim == 1:
            return ["label", "score"], [self.labels, self.scores.tolist()]
        return ["label", *self.target_names], [self.labels, *self.scores.tolist()]

    def metadata(self) -> dict[str, Any]:
        """Everything but the tensors, as a file keeps it."""
        found = None if self.verification is None else asdict(self.verification)
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in TENSORS} | {"verification": found}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], content: dict[str, Any]) -> Attribution:
        """From the parts of a file; older ones know no verification."""
        found = content.get("verification")
        return cls(**tensors, **{**content, "verification": None if found is None else Verification(**found)})
