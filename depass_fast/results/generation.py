"""Generated text, and the tokens that every token of it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.brief import cut
from ..runtime.terminal import encodable
from .attribution import Attribution, pack, unpack
from .files import read_result, register_format, write_result
from .tables import data_frame, write_csv
from .verification import Verification, merge

if TYPE_CHECKING:
    import pandas

FORMAT = "depass_fast.generation.v1"

_OWN = ("prompt_length", "input_ids", "tokens", "text")  # fields of a file, beside those of the steps
_COLUMNS = ("position", "token", "label", "score")


@dataclass(eq=False)
class Generation:
    """A generated sequence of N tokens; the first ``prompt_length`` of them are the prompt.

    ``input_ids`` and ``tokens`` (N,) hold all of them; ``text`` is the whole sequence, None without a tokenizer.
    ``steps`` holds an :class:`Attribution` per generated token: the shares of all tokens before it in its logit.
    ``unknown`` holds what a file of a later version says besides; it is saved again.
    """

    prompt_length: int
    input_ids: list[int]
    tokens: list[str]
    text: str | None
    steps: list[Attribution]
    unknown: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, steps: Sequence[Attribution], prompt_length: int, tokenizer: Any | None) -> Generation:
        """Return the generation of attributions over all N tokens; each keeps the tokens before its own only."""
        ids, tokens = steps[0].input_ids, steps[0].tokens
        text = None if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)
        return cls(prompt_length, ids, tokens, text, [_up_to_its_position(step) for step in steps])

    @property
    def scores(self) -> Tensor:
        """The shares of tokens in generated tokens: (N - prompt_length, N), zero where they do not come before."""
        scores = torch.zeros(len(self.steps), len(self.input_ids), dtype=self.steps[0].scores.dtype, device="cpu")
        for row, step in zip(scores, self.steps, strict=True):
            row[: step.position + 1] = step.scores[: step.position + 1]
        return scores

    @property
    def completeness_error(self) -> float:
        """The largest error of a step."""
        return max(step.completeness_error for step in self.steps)

    @property
    def verification(self) -> Verification | None:
        """The verification of all steps together; None where nothing was verified."""
        return merge(step.verification for step in self.steps)

    def to_dataframe(self) -> pandas.DataFrame:
        """Return a DataFrame with a row per generated token and component before it. Needs pandas.

        Its columns are `position`, `token`, `label` and `score`. Its ``attrs`` are :meth:`Attribution.how`, of all.
        """
        how = {name: value for name, value in self.steps[0].how().items() if name != "position"}
        return data_frame(_COLUMNS, self._rows(), how | {"completeness_error": self.completeness_error})

    def to_csv(self, path: str | Path) -> None:
        """Write the table of :meth:`to_dataframe` as a file."""
        write_csv(path, _COLUMNS, self._rows())

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values; ``steps`` lists those of every step."""
        return {
            "prompt_length": self.prompt_length,
            "input_ids": self.input_ids,
            "tokens": self.tokens,
            "text": self.text,
            "completeness_error": self.completeness_error,
            "steps": [step.to_dict() for step in self.steps],
        }

    def save(self, path: str | Path) -> None:
        """Write a safetensors file like :meth:`Attribution.save`, which :meth:`load` reads."""
        tensors, steps = pack(self.steps, self.unknown)
        own = {name: getattr(self, name) for name in _OWN}
        unknown = {name: value for name, value in self.unknown.items() if not isinstance(value, Tensor)}
        write_result(path, FORMAT, tensors, {**unknown, **own, "steps": steps})

    @classmethod
    def load(cls, path: str | Path) -> Generation:
        """Read what :meth:`save` wrote. Raises ValueError if the file holds no Generation."""
        return read_result(path, FORMAT)

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], content: dict[str, Any]) -> Generation:
        """Return the generation that a file's parts describe; later files have fields that are not known here."""
        steps, more_tensors = unpack(tensors, content["steps"])
        unknown = {name: value for name, value in content.items() if name not in (*_OWN, "steps")}
        return cls(**{name: content[name] for name in _OWN}, steps=steps, unknown=unknown | more_tensors)

    def _rows(self) -> list[tuple[int, str, str, float]]:
        """Return the rows of a table of all steps."""
        return [
            (step.position + 1, self.tokens[step.position + 1], label, score)
            for step in self.steps
            for label, score in zip(step.labels, step.scores.tolist(), strict=True)
        ]

    def __str__(self) -> str:
        """Return a line per generated token: the three tokens that gave most to it."""
        lines = [] if self.text is None else [self.text, ""]
        for step in self.steps:
            best = "   ".join(f"{label} {score:+.2f}" for label, score in step.top(3))
            lines.append(f"{step.position + 1:5d} {self.tokens[step.position + 1]!r:16} {best}")
        found = "" if self.verification is None else f" | verified: {self.verification}"
        return encodable("\n".join([*lines, "", f"completeness error {self.completeness_error:.1e}{found}"]))

    def __repr__(self) -> str:
        new = "".join(self.tokens[self.prompt_length :])
        made = cut(f"{self.prompt_length} tokens of a prompt, {len(self.steps)} generated: {new!r}", 600)
        return encodable(f"Generation({made} | the last: {self.steps[-1]!r})")


def _up_to_its_position(step: Attribution) -> Attribution:
    """Return a step without the tokens after the position that is read; they have no share."""
    n, first_extra = step.position + 1, len(step.labels) - step.n_extras
    kept = [*range(n), *range(first_extra, len(step.labels))]
    labels = [step.labels[i] for i in kept]
    return replace(step, scores=step.scores[kept], labels=labels, input_ids=step.input_ids[:n], tokens=step.tokens[:n])


register_format(FORMAT, Generation.restore)
