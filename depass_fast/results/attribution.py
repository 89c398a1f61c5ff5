"""The result of an attribution: scores with aligned labels, their measured error, and how they came about."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..labels import BIAS, REST
from ..linear_rules import LINEAR_RULES
from .drawn import DrawnLayer
from .estimate import Estimate, estimate_dict
from .files import known_fields, plain_part, read_result, register_format, restore_part, write_result
from .html import AsPage
from .interface import Result, Row
from .provenance import Provenance
from .ranking import leading, score_of, target_row
from .render import plain, rich_view, short
from .tables import data_frame, unique_names, write_csv
from .verification import Verification

if TYPE_CHECKING:
    import pandas

FORMAT = "depass_fast.attribution.v1"
TENSORS = ("scores", "target_logits", "layer_errors")


@dataclass(eq=False)
class Attribution(DrawnLayer, AsPage):
    """The share of every component in the target's logit.

    ``scores`` (M,), or (K, M) for a list of K targets, in the order of ``labels``: tokens, heads or neurons in their
    natural order, then `rest` and `bias` where they exist. ``target_logits`` () or (K,) are the model's own; they
    equal the sum of the scores up to ``completeness_error``.

    ``completeness_error`` is the largest of |Σ_m score - logit| / Σ_m |score|, over the targets, and of
    ``layer_errors``: max_n ‖Σ_m X[n, m] - x[n]‖ / ‖x[n]‖, at the start and after every layer passed.

    ``method`` says how the scores were computed: "exact", or "adjoint", which passes no states, so that there are no
    ``layer_errors``. The adjoint is exact under a linear rule and approximate else, see ``is_exact``. An approximate
    result holds an ``estimate`` of its error where a sample was drawn
    (:class:`depass_fast.Estimate`). ``warnings`` says where a result is not to be relied upon: a bad estimate, an exact
    result that misses more than its dtypes explain (:class:`depass_fast.CompletenessWarning`), a failed verification.

    ``verification`` is what ``verify=True`` found (:class:`depass_fast.Verification`), in all prompts of the call;
    where it failed, ``warnings`` says so.

    ``target_kinds`` says what each target is: "logit", "contrast" (the difference of two logits), "log-prob" (the
    direction of a log-probability with P frozen: scores sum to log P plus the entropy of P) or "vector".

    ``written_at`` holds the positions that a ledger's heads or neurons were counted at; None: at all.

    ``exclude_special`` holds the positions that were kept out of the allocation, as the option of that name takes them;
    ``site`` is where in ``layer`` the components started, ``end`` the layer whose input was read (None: after the final
    norm), ``sweep`` the numbers of an adjoint sweep. ``provenance`` names the model and the packages. ``reduced`` says
    what the sum or the mean of a :class:`depass_fast.Continuation` is of: `by`, `prompt_length`, `tokens` (how many,
    the last one read at ``position``), and `log_prob` and `entropy`, whose sum ``target_logits`` is. Files of version
    0.1.0 know none of these: they are None then. ``unknown`` holds what a file of a later version says besides; it is
    saved again.
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
    estimate: Estimate | None = None
    warnings: list[str] | None = None
    memory_budget: int | None = None  # bytes of workspace that were used in the end; None: not bounded
    verification: Verification | None = None
    exclude_special: list[int] | None = None
    value_activation: str | None = None  # "shared" where the allocation shared out the activations of values
    state_dtype: str | None = None
    compute_dtype: str | None = None  # of the products
    site: str | None = None
    end: int | None = None
    sweep: dict[str, Any] | None = None
    provenance: Provenance | None = None
    reduced: dict[str, Any] | None = None
    target_kinds: list[str] | None = None
    written_at: list[int] | None = None  # the positions where heads or neurons of a ledger were counted; None: all
    unknown: dict[str, Any] = field(default_factory=dict, repr=False)

    def top(self, k: int = 10, target: int = 0, by: str = "magnitude", extras: bool = False) -> list[tuple[str, float]]:
        """Return the ``k`` leading components as (label, score).

        ``by`` is "magnitude", "positive" (the largest) or "negative". `rest` and `bias` are left out unless ``extras``:
        what is not decomposed is not ranked with what is.
        """
        scores = self.scores_of(target)
        return leading(self.labels, scores if extras else scores[: len(self.labels) - self.n_extras], k, by)

    @property
    def is_exact(self) -> bool:
        """True unless the scores are approximate: those of the adjoint, under a rule that is not linear."""
        return self.method == "exact" or self.allocation in LINEAR_RULES

    @property
    def n_extras(self) -> int:
        """The number of last labels that are `rest` and `bias`; no component kind names its components so."""
        return sum(label in (REST, BIAS) for label in self.labels[-2:])

    def score(self, label: str, target: int = 0) -> float:
        """Return the score of one component by its label; raises KeyError where there is none."""
        return score_of(self.labels, self.scores_of(target), label)

    def to_dataframe(self) -> pandas.DataFrame:
        """Return a DataFrame with a row per component: `label`, and a column of scores per target. Needs pandas.

        Its ``attrs`` are :meth:`how`.
        """
        names, columns = self.columns()
        return data_frame(names, zip(*columns, strict=True), self.how())

    def to_circuitsvis(self, target: int = 0) -> dict[str, list]:
        """Return the arguments of `circuitsvis.tokens.colored_tokens`: the tokens and their scores, without `bias`.

        Raises:
            ValueError: the components are no tokens.
        """
        if self.components != "tokens":
            raise ValueError(f"to_circuitsvis: it colours the prompt, whose tokens these {self.components} are not.")
        return {"tokens": list(self.tokens), "values": self.scores_of(target)[: len(self.tokens)].tolist()}

    def to_csv(self, path: str | Path) -> None:
        """Write a table with a row per component: `label`, and a column of scores per target."""
        names, columns = self.columns()
        write_csv(path, names, zip(*columns, strict=True))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose header carries everything else as JSON. Nothing is pickled."""
        write_result(path, FORMAT, self.tensors(), self.metadata())

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read a file of :meth:`save`. One of :meth:`depass_fast.LayeredAttribution.save` gives a LayeredAttribution.

        :meth:`depass_fast.Generation.load` reads generations.

        Raises:
            ValueError: the file is no saved attribution, or has a format that only later versions read.
        """
        return read_result(path)

    def how(self) -> dict[str, Any]:
        """Return plain values that say how the scores were computed, and with which model: all that made them."""
        names = (
            *(
                "components",
                "layer",
                "site",
                "position",
                "end",
                "method",
                "sweep",
                "allocation",
                "temperature",
                "value_activation",
                "reduced",
                "written_at",
            ),
            *("exclude_special", "backend", "device", "dtype", "state_dtype", "compute_dtype", "completeness_error"),
        )
        return {name: getattr(self, name) for name in names} | {
            "provenance": None if self.provenance is None else asdict(self.provenance)
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values under the names that ``depass-fast attribute --json`` prints."""
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
            "target_kind": self.target_kinds[0] if single and self.target_kinds else self.target_kinds,
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
            "is_exact": self.is_exact,
            "estimate": estimate_dict(self.estimate),
            "warnings": self.warnings or [],
            "memory_budget": self.memory_budget,
            "verification": None if self.verification is None else asdict(self.verification),
            **{name: getattr(self, name) for name in ("exclude_special", "state_dtype", "compute_dtype", "site")},
            "value_activation": self.value_activation,
            "written_at": self.written_at,
            "end": self.end,
            "sweep": self.sweep,
            "reduced": self.reduced,
            "provenance": None if self.provenance is None else asdict(self.provenance),
        }

    def layer_text(self) -> str:
        """Return the layer in words."""
        return f"layer {self.layer}"

    def scores_of(self, target: int) -> Tensor:
        """Return the scores of one target, `rest` and `bias` included: (M,). Raises IndexError where there is none."""
        return target_row(self.scores, target)

    def rows(self, target: int, top: int) -> list[Row]:
        """Return the ``top`` leading components, the sum of the others, `rest` and `bias`, and the sum of all."""
        scores = self.scores_of(target).tolist()
        named = len(scores) - self.n_extras
        shown = self.top(top, target)
        rows = [Row(label, score) for label, score in shown]
        if len(shown) < named:
            others = math.fsum(scores[:named]) - math.fsum(score for _, score in shown)
            rows.append(Row(f"{named - len(shown)} others", others, ranked=False))
        rows += [Row(label, score, False) for label, score in zip(self.labels[named:], scores[named:], strict=True)]
        return [*rows, Row("sum", math.fsum(scores), ranked=False)]

    def __str__(self) -> str:
        return plain(self)

    def __repr__(self) -> str:
        return short(self)

    def __rich__(self) -> Any:
        return rich_view(self)

    def columns(self) -> tuple[list[str], list[list]]:
        """Return names and values of a table's columns: the labels, then the scores of every target."""
        if self.scores.ndim == 1:
            return ["label", "score"], [self.labels, self.scores.tolist()]
        ids = [(one, other) for one, other in zip(self.target_ids, self.contrast_ids, strict=True)]
        return ["label", *unique_names(self.target_names, ids)], [self.labels, *self.scores.tolist()]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors, as a file keeps them."""
        unknown = {name: value for name, value in self.unknown.items() if isinstance(value, Tensor)}
        return {name: getattr(self, name).contiguous() for name in TENSORS} | unknown

    def metadata(self) -> dict[str, Any]:
        """Return everything but the tensors, as a file keeps it."""
        unknown = {name: value for name, value in self.unknown.items() if not isinstance(value, Tensor)}
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in (*TENSORS, "unknown")}
        parts = {name: plain_part(values[name], unknown.pop(name, None)) for name in PARTS}
        return unknown | values | parts

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], content: dict[str, Any]) -> Attribution:
        """Return the result that a file's parts describe; older files lack fields, later ones have some more."""
        values, unknown = known_fields(cls, {**tensors, **content})
        for name, (part, make) in PARTS.items():
            values[name], more = restore_part(make, part, values.get(name))
            unknown |= {name: more} if more else {}
        return cls(**values, unknown=unknown)


PARTS: dict[str, tuple[type, Callable[..., Any]]] = {
    "estimate": (Estimate, lambda **values: Estimate.from_dict(values)),
    "verification": (Verification, Verification),
    "provenance": (Provenance, Provenance),
}


def pack(results: Sequence[Attribution], unknown: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the tensors and the contents of several results in one file, with the tensors among the ``unknown``."""
    tensors = {f"{i}.{name}": tensor.clone() for i, one in enumerate(results) for name, tensor in one.tensors().items()}
    tensors |= {name: value for name, value in unknown.items() if isinstance(value, Tensor)}
    return tensors, [result.metadata() for result in results]


def unpack(
    tensors: dict[str, Tensor], contents: Sequence[dict[str, Any]]
) -> tuple[list[Attribution], dict[str, Tensor]]:
    """Return the results that :func:`pack` put into a file, and the tensors that are of none of them."""
    each: list[dict[str, Tensor]] = [{} for _ in contents]
    unknown: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        if number.isdecimal() and int(number) < len(each):
            each[int(number)][name] = tensor
        else:
            unknown[key] = tensor
    return [Attribution.restore(held, content) for held, content in zip(each, contents, strict=True)], unknown


register_format(FORMAT, Attribution.restore)
