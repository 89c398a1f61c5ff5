"""The tokens that follow a prompt, and what every one of them came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from ..runtime.brief import cut
from ..runtime.terminal import encodable
from .attribution import PARTS, Attribution, pack, unpack
from .drawn import DrawnContinuation
from .estimate import Estimate, worst_of
from .files import plain_part, read_result, register_format, restore_part, write_result
from .html import AsPage
from .interface import Result
from .layered import LayeredAttribution
from .provenance import Provenance
from .render import TextAbove
from .tables import data_frame, write_csv
from .verification import Verification, merge

if TYPE_CHECKING:
    import pandas

REDUCTIONS = ("sum", "mean")

Steps = TypeVar("Steps", Attribution, LayeredAttribution)


@dataclass(eq=False, repr=False)
class Continuation(DrawnContinuation, AsPage, Generic[Steps]):
    """The shares of every component in T tokens that follow a prompt, of one decomposition of prompt and tokens.

    Every token has two rows of shares. Those in its logit sum to the logit. Those in its log-probability are shares in
    the direction w_t - Σ_j p_j w_j, with the model's probabilities p frozen: the gradient of log p_t. They sum to
    logit_t - Σ_j p_j logit_j, which is log p_t plus the entropy of p. Entropy, which all tokens have in common, is
    attributed to nobody; ``log_probs`` and ``entropies`` hold both.

    ``prompt_length`` tokens are the prompt's; ``text`` is the whole, None without a tokenizer. ``log_probs`` (T,) are
    the model's own. ``shares`` holds all rows, first those of the T logits, then those of the T log-probabilities: an
    :class:`Attribution`, or a :class:`LayeredAttribution` for components of several layers. ``unknown`` holds what a
    file of a later version says besides; it is saved again.
    """

    prompt_length: int
    text: str | None
    log_probs: Tensor
    shares: Steps
    unknown: dict[str, Any] = field(default_factory=dict)

    origin: ClassVar[str] = "given"
    format: ClassVar[str] = "depass_fast.continuation.v1"

    @classmethod
    def of(cls, steps: Sequence[Steps], prompt_length: int, tokenizer: Any | None, log_z: Tensor) -> Any:
        """Return the continuation of T attributions with two targets each, and of its log Z (T,)."""
        shares = _stacked(steps)
        ids = shares.input_ids
        text = None if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)
        return cls(prompt_length, text, shares.target_logits[: len(steps)] - log_z.to(shares.target_logits), shares)

    def __len__(self) -> int:
        """T, the number of tokens that follow the prompt."""
        return len(self.log_probs)

    @property
    def input_ids(self) -> list[int]:
        """The ids of all N tokens."""
        return self.shares.input_ids

    @property
    def tokens(self) -> list[str]:
        """All N tokens as text."""
        return self.shares.tokens

    @property
    def labels(self) -> list[str]:
        """The components' labels, in the order of the rows of :attr:`scores`."""
        return self.shares.labels

    @property
    def scores(self) -> Tensor:
        """The shares in the logits: (T, M), or (T, layers, I) for several layers, without `rest` and `bias` then."""
        return self.shares.scores[: len(self)]

    @property
    def log_prob_scores(self) -> Tensor:
        """The shares in the log-probabilities, of the shape of :attr:`scores`."""
        return self.shares.scores[len(self) :]

    @property
    def logits(self) -> Tensor:
        """The model's own logits of the tokens: (T,)."""
        return self.shares.target_logits[: len(self)]

    @property
    def entropies(self) -> Tensor:
        """The entropies of the model's predictions in front of the tokens, in nats: (T,)."""
        return self.shares.target_logits[len(self) :] - self.log_probs

    @property
    def sum(self) -> Steps:
        """The shares in the sum of the log-probabilities. Its ``target_logits`` are that sum plus the entropies'.

        Its ``reduced`` holds both, see :class:`Attribution`.
        """
        return self._reduced("sum", 1.0)

    @property
    def mean(self) -> Steps:
        """The shares in the mean of the log-probabilities, see :attr:`sum`."""
        return self._reduced("mean", 1.0 / len(self))

    @property
    def steps(self) -> list[Steps]:
        """The shares in every token's logit, as a call on the tokens before it would give them."""
        return [self._step(k, self.prompt_length - 1 + k) for k in range(len(self))]

    @property
    def log_prob_steps(self) -> list[Steps]:
        """The shares in every token's log-probability, otherwise as :attr:`steps`."""
        return [self._step(len(self) + k, self.prompt_length - 1 + k) for k in range(len(self))]

    @property
    def completeness_error(self) -> float:
        """The largest error of a token's shares, or of a state on the way."""
        return self.shares.completeness_error

    @property
    def warnings(self) -> list[str] | None:
        """Warnings to be known before relying on the shares; None where there are none."""
        return self.shares.warnings

    @property
    def verification(self) -> Verification | None:
        """The verification of the decomposition; None where nothing was verified."""
        return self.shares.verification

    @property
    def estimate(self) -> Estimate | None:
        """The estimate of an adjoint sweep's error, of all tokens; None where nothing was sampled."""
        return self.shares.estimate

    @property
    def provenance(self) -> Provenance | None:
        """The model and the packages that made the result."""
        return self.shares.provenance

    def how(self) -> dict[str, Any]:
        """Return plain values that say how the scores were computed, and with which model, see Attribution.how."""
        return {name: value for name, value in self.shares.how().items() if name not in ("position", "reduced")}

    def _reduced(self, name: str, factor: float) -> Steps:
        """Return the sum of the log-probabilities' rows times ``factor``, as read at the last position."""
        what = f"{name} of log P of {len(self)} tokens, P frozen"
        rows = slice(len(self), None)
        how = {
            "by": name,
            "prompt_length": self.prompt_length,
            "tokens": len(self),
            "log_prob": math.fsum(self.log_probs.tolist()) * factor,
            "entropy": math.fsum(self.entropies.tolist()) * factor,
        }

        def reduced(one: Attribution) -> Attribution:
            return replace(
                one,
                scores=one.scores[rows].sum(0) * factor,
                target_logits=one.target_logits[rows].sum(0) * factor,
                target_names=[what],
                target_ids=[None],
                contrast_ids=[None],
                target_kinds=["log-prob"],
                reduced=how,
            )

        return _mapped(self.shares, reduced)

    def _step(self, row: int, position: int) -> Steps:
        """Return one row, read at ``position``, without the tokens behind it."""

        def chosen(one: Attribution) -> Attribution:
            one = replace(
                one,
                scores=one.scores[row].clone(),
                target_logits=one.target_logits[row].clone(),
                target_names=[one.target_names[row]],
                target_ids=[one.target_ids[row]],
                contrast_ids=[None],
                target_kinds=None if one.target_kinds is None else [one.target_kinds[row]],
                position=position,
            )
            return _up_to_its_position(one)

        return _mapped(self.shares, chosen)

    def page_parts(self) -> list[tuple[str, Result]]:
        """Return the results that have sheets on a page: the sum of the log-probabilities, then every token's logit."""
        steps = [(f"{step.position + 1}", step) for step in self.steps]
        return [("all", self.sum), *steps]  # pyright: ignore[reportReturnType]

    def to_dataframe(self) -> pandas.DataFrame:
        """Return a DataFrame with a row per token that follows and component before it. Needs pandas.

        Its columns are `position`, `token`, `label`, `score` (in the logit) and `log_prob_score`; for several layers
        also `layer`. Its ``attrs`` are :meth:`Attribution.how`, of all.
        """
        return data_frame(*self._table(), self.how())

    def to_csv(self, path: str | Path) -> None:
        """Write the table of :meth:`to_dataframe` as a file."""
        write_csv(path, *self._table())

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values; ``steps`` and ``log_prob_steps`` list those of every step."""
        return {
            "prompt_length": self.prompt_length,
            "input_ids": self.input_ids,
            "tokens": self.tokens,
            "text": self.text,
            **self.how(),
            "warnings": self.warnings or [],
            "estimate": None if self.estimate is None else self.estimate.to_dict(),
            "verification": None if self.verification is None else asdict(self.verification),
            "log_probs": self.log_probs.tolist(),
            "entropies": self.entropies.tolist(),
            "steps": [step.to_dict() for step in self.steps],
            "log_prob_steps": [step.to_dict() for step in self.log_prob_steps],
        }

    def save(self, path: str | Path) -> None:
        """Write a safetensors file like :meth:`Attribution.save`; :meth:`Attribution.load` reads it, too."""
        tensors, layers = pack(_parts(self.shares), self.unknown)
        unknown = {name: value for name, value in self.unknown.items() if not isinstance(value, Tensor)}
        content = {
            "prompt_length": self.prompt_length,
            "text": self.text,
            "layered": isinstance(self.shares, LayeredAttribution),
            "layers": layers,
            "estimate": plain_part(self.shares.estimate, unknown.pop("estimate", None)),
            "warnings": self.shares.warnings,
        }
        write_result(path, self.format, tensors | {"log_probs": self.log_probs.clone()}, unknown | content)

    @classmethod
    def load(cls, path: str | Path) -> Any:
        """Read what :meth:`save` wrote. Raises ValueError if the file holds something else."""
        return read_result(path, cls.format)

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], content: dict[str, Any]) -> Any:
        """Return the result that a file's parts describe; later files have fields that are not known here."""
        own = ("prompt_length", "text", "layered", "layers", "estimate", "warnings")
        unknown: dict[str, Any] = {name: value for name, value in content.items() if name not in own}
        layers, more = unpack(tensors, content["layers"])
        log_probs = more.pop("log_probs")
        estimate, of_estimate = restore_part(PARTS["estimate"][1], Estimate, content["estimate"])
        unknown |= {"estimate": of_estimate} if of_estimate else {}
        shares: Any = LayeredAttribution(layers, estimate, content["warnings"]) if content["layered"] else layers[0]
        return cls(content["prompt_length"], content["text"], log_probs, shares, unknown | more)

    def _table(self) -> tuple[list[str], list[tuple]]:
        """Return the names of a table's columns, and its rows."""
        rows = []
        for step, other in zip(self.steps, self.log_prob_steps, strict=True):
            at = step.position + 1
            for one, beside in zip(_parts(step), _parts(other), strict=True):
                layer = (one.layer,) if isinstance(step, LayeredAttribution) else ()
                scores = zip(one.labels, one.scores.tolist(), beside.scores.tolist(), strict=True)
                rows += [(at, self.tokens[at], *layer, *row) for row in scores]
        layer = ["layer"] if isinstance(self.shares, LayeredAttribution) else []
        return ["position", "token", *layer, "label", "score", "log_prob_score"], rows

    def __str__(self) -> str:
        """Return a line per token: its log-probability and the three components that gave most to its logit."""
        return encodable(self._text())

    def _text(self) -> str:
        """Return the text of ``str``, whatever an encoding lacks."""
        lines = [] if self.text is None else [self.text, ""]
        lines += [f"WARNING: {text}." for text in self.warnings or []]
        for step, log_prob in zip(self.steps, self.log_probs.tolist(), strict=True):
            best = "   ".join(f"{label} {score:+.2f}" for label, score in step.top(3))
            token = self.tokens[step.position + 1]
            lines.append(f"{step.position + 1:5d} {token!r:16} log P {round(log_prob, 3) + 0.0:7.3f}   {best}")
        total = math.fsum(self.log_probs.tolist())
        found = "" if self.verification is None else f" | verified: {self.verification}"
        end = f"log P of all {round(total, 3) + 0.0:.3f} | completeness error {self.completeness_error:.1e}{found}"
        return "\n".join([*lines, "", end])

    def __repr__(self) -> str:
        new = ("" if self.text is not None else " ").join(self.tokens[self.prompt_length :])  # else they are ids
        made = cut(f"{self.prompt_length} tokens of a prompt, {len(self)} {self.origin}: {new!r}", 600)
        return encodable(f"{type(self).__name__}({made} | the last: {self.steps[-1]!r})")

    def __rich__(self) -> Any:
        return TextAbove(self._text(), self.sum)


def _parts(result: Attribution | LayeredAttribution) -> list[Attribution]:
    """Return the attributions of all layers."""
    return result.by_layer if isinstance(result, LayeredAttribution) else [result]


def _mapped(result: Any, change: Callable[[Attribution], Attribution]) -> Any:
    """Return a result whose attributions are those that ``change`` makes of its own."""
    if isinstance(result, LayeredAttribution):
        return replace(result, by_layer=[change(one) for one in result.by_layer])
    return change(result)


def _stacked(steps: Sequence[Any]) -> Any:
    """Return T results with two targets each as one with 2T targets: all first ones, then all second ones."""
    if not isinstance(steps[0], LayeredAttribution):
        return _stacked_layer(steps)
    layers = [_stacked_layer(of_layer) for of_layer in zip(*(step.by_layer for step in steps), strict=True)]
    return LayeredAttribution(layers, worst_of(step.estimate for step in steps), _said(steps))


def _stacked_layer(steps: Sequence[Attribution]) -> Attribution:
    return replace(
        steps[-1],
        scores=torch.stack([step.scores for step in steps], 1).flatten(0, 1),
        target_logits=torch.stack([step.target_logits for step in steps], 1).flatten(),
        completeness_error=max(step.completeness_error for step in steps),
        target_names=[step.target_names[k] for k in range(2) for step in steps],
        target_ids=[step.target_ids[k] for k in range(2) for step in steps],
        contrast_ids=[None] * (2 * len(steps)),
        target_kinds=["logit"] * len(steps) + ["log-prob"] * len(steps),
        estimate=worst_of(step.estimate for step in steps),
        warnings=_said(steps),
        verification=merge(step.verification for step in steps),
    )


def _said(steps: Iterable[Attribution | LayeredAttribution]) -> list[str] | None:
    """Return the warnings of all, each once."""
    return list(dict.fromkeys(text for step in steps for text in step.warnings or [])) or None


def _up_to_its_position(step: Attribution) -> Attribution:
    """Return a step without the tokens after the position that is read; they have no share."""
    n = step.position + 1
    step = replace(step, input_ids=step.input_ids[:n], tokens=step.tokens[:n])
    if step.components != "tokens":
        return step
    kept = [*range(n), *range(len(step.labels) - step.n_extras, len(step.labels))]
    return replace(step, scores=step.scores[kept], labels=[step.labels[i] for i in kept])


register_format(Continuation.format, Continuation.restore)
