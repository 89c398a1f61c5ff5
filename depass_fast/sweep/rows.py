"""Results as rows of a table: a row per prompt, target, position and component (Arrow)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..labels import BIAS, REST
from .outcomes import Outcome

if TYPE_CHECKING:
    import pyarrow

OTHERS = "others"  # the sum of what --top leaves out
EXTRAS = (REST, BIAS, OTHERS)
# what a row says of its result, and not of its component
OF_A_RESULT = ("prompt", "target", "target_number", "target_logit", "position", "completeness_error", "warnings")


@dataclass
class Rows:
    """Rows that grow by results until they are made into a table. ``top`` keeps that many components of a result."""

    top: int | None = None
    count: int = 0
    prompts: int = 0
    _of_results: list[tuple] = field(default_factory=list)  # the values of OF_A_RESULT
    _repeats: list[int] = field(default_factory=list)  # the rows of each
    _layers: list[np.ndarray] = field(default_factory=list)
    _labels: list[tuple[Sequence[str], int]] = field(default_factory=list)  # with how many of them are named
    _scores: list[np.ndarray] = field(default_factory=list)
    _kind: str = ""

    def add(self, outcome: Outcome) -> None:
        """Take in the results of a prompt."""
        self.prompts += 1
        for result in outcome.results:
            self._add(outcome, result)

    @property
    def nbytes(self) -> int:
        """The bytes that the rows hold, about."""
        return 64 * self.count

    def _add(self, outcome: Outcome, result: Any) -> None:
        parts, said = list(_parts(result)), "; ".join([*outcome.doubts, *(result.warnings or [])]) or None
        self._kind = result.components
        for target, name in enumerate(result.target_names):
            logit = float(torch.atleast_1d(result.target_logits)[target])
            shown = _shown(parts, target, self.top)
            count = sum(len(part.labels) for part in shown)
            of_result = (outcome.id, name, target, logit, result.position, result.completeness_error, said)
            self._of_results.append(of_result)
            self._repeats.append(count)
            for part in shown:
                self._layers.append(np.full(len(part.labels), part.layer, np.int32))
                self._labels.append((part.labels, part.named))
                self._scores.append(part.scores)
            self.count += count

    def table(self) -> pyarrow.Table:
        """Return the rows as a table; columns that repeat are stored once per value."""
        import pyarrow

        repeats, columns = np.array(self._repeats), {}
        for name, values in zip(OF_A_RESULT, zip(*self._of_results, strict=True), strict=True):
            array = pyarrow.array(values, _type_of(name))
            if name in ("prompt", "target", "warnings"):
                array = array.dictionary_encode()
            columns[name] = array.take(pyarrow.array(np.repeat(np.arange(len(repeats)), repeats)))
        labels, kinds = _encoded(self._labels, self._kind)
        columns |= {
            "layer": pyarrow.array(np.concatenate(self._layers)),
            "component": kinds,
            "label": labels,
            "score": pyarrow.array(np.concatenate(self._scores)),
        }
        return pyarrow.table({name: columns[name] for name in COLUMNS})


COLUMNS = (
    *("prompt", "target", "target_number", "position", "layer", "component", "label", "score"),
    *("target_logit", "completeness_error", "warnings"),
)


def _type_of(name: str) -> Any:
    import pyarrow

    kinds = {"target_number": pyarrow.int32(), "position": pyarrow.int32(), "completeness_error": pyarrow.float32()}
    texts = ("prompt", "target", "warnings")
    return pyarrow.string() if name in texts else kinds.get(name, pyarrow.float64())


class _Part(NamedTuple):
    """The rows of one layer: labels, of which the first ``named`` are no extras, and scores, (K, M) or (M,)."""

    layer: int
    labels: Sequence[str]
    named: int
    scores: np.ndarray


def _parts(result: Any) -> Iterator[_Part]:
    """Yield every layer of a result, with the scores (K, M) of all targets."""
    for one in result.by_layer if hasattr(result, "by_layer") else [result]:
        yield _Part(one.layer, one.labels, len(one.labels) - one.n_extras, torch.atleast_2d(one.scores).numpy())


def _shown(parts: Iterable[_Part], target: int, top: int | None) -> list[_Part]:
    """Return what gets a row, with the scores (M,) of one target: all, or the ``top`` and every layer's `others`.

    `rest` and `bias` always have a row, so that the sum of a layer's rows is the sum of its scores.
    """
    rows = [part._replace(scores=part.scores[target]) for part in parts]
    if top is None:
        return rows
    sizes = np.abs(np.concatenate([part.scores[: part.named] for part in rows]))
    kept = np.zeros(len(sizes), bool)
    kept[np.argsort(-sizes, kind="stable")[:top]] = True
    found, first = [], 0
    for layer, labels, named, scores in rows:
        chosen = np.flatnonzero(kept[first : first + named])
        first += named
        extras: list[str] = list(labels[named:])
        values = [scores[chosen], scores[named:]]
        if len(chosen) < named:
            others = scores[:named].sum(dtype=np.float64) - scores[chosen].sum(dtype=np.float64)
            values, extras = [*values, np.array([others], scores.dtype)], [*extras, OTHERS]
        shown = [*(labels[i] for i in chosen.tolist()), *extras]
        found.append(_Part(layer, shown, len(chosen), np.concatenate(values)))
    return found


def _encoded(parts: Sequence[tuple[Sequence[str], int]], kind: str) -> tuple[Any, Any]:
    """Return the labels of all rows and the kinds of their components, each value stored once."""
    import pyarrow

    numbers: dict[str, int] = {}
    known: dict[tuple[tuple[str, ...], int], tuple[np.ndarray, np.ndarray]] = {}
    at, kinds = [], []
    for labels, named in parts:
        key = tuple(labels), named
        if key not in known:
            extras = [EXTRAS.index(label) + 1 for label in labels[named:]]
            known[key] = (
                np.array([numbers.setdefault(label, len(numbers)) for label in labels], np.int32),
                np.array([0] * named + extras, np.int8),
            )
        at.append(known[key][0])
        kinds.append(known[key][1])
    names = pyarrow.array(list(numbers), pyarrow.string())
    of_kind = pyarrow.array([kind.removesuffix("s"), *EXTRAS], pyarrow.string())
    encode = pyarrow.DictionaryArray.from_arrays
    return encode(np.concatenate(at), names), encode(np.concatenate(kinds), of_kind)


def empty_table() -> pyarrow.Table:
    """Return a table of the same columns without rows."""
    import pyarrow

    kinds = {"layer": pyarrow.int32(), "component": pyarrow.string(), "label": pyarrow.string()}
    return pyarrow.table({name: pyarrow.array([], kinds.get(name) or _type_of(name)) for name in COLUMNS})


def failures_table(outcomes: Sequence[Outcome]) -> pyarrow.Table:
    """Return the failed prompts as a table: `prompt`, `error`, `reason`."""
    import pyarrow

    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    columns = {"prompt": "id", "error": "error", "reason": "reason"}
    return pyarrow.table(
        {name: pyarrow.array([getattr(one, of) for one in failures], pyarrow.string()) for name, of in columns.items()}
    )
