"""A sweep's question: the components and the options of all prompts, and each prompt prepared for it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..adapters import Adapter
from ..chosen_method import choose_method
from ..components.base import ComponentKind
from ..inputs.doubts import doubt, doubt_first_word
from ..inputs.prompt_set import Item
from ..inputs.prompts import as_positions, encode, is_list_of_positions
from ..inputs.targets import LogProb, TargetSpec, parse_target, texts_in
from ..inputs.text import spaced
from ..inputs.token_texts import lacks_space
from ..options import Adjoint, Options
from ..request import check_kind, keeps_first_apart
from .failed import OF_A_PROMPT, FailedPrompt


@dataclass(frozen=True)
class Asked:
    """The question of a sweep. ``target_kind`` "log-prob" reads the log-probabilities of the targets."""

    adapter: Adapter
    tokenizer: Any | None
    settings: Options
    components: ComponentKind
    method: str | Adjoint | None = None
    target_kind: str = "logit"

    def check(self) -> None:
        """Check what holds for all prompts, before any work.

        Raises:
            ValueError, TypeError: as :meth:`depass_fast.DePass.attribute`.
        """
        if self.settings.shard is not None:
            raise ValueError(
                "shard: a sweep deals prompts to processes, and a shard the components of one prompt; give shard=None."
            )
        self.settings.build(self.adapter)
        check_kind(self.components)
        if self.target_kind not in ("logit", "log-prob"):
            raise ValueError(f"target_kind: {self.target_kind!r} is not one of 'logit', 'log-prob'.")
        for kind in self.components.each(self.adapter):
            kind.resolve(self.adapter)
        choose_method(self.method, self.components, self.adapter, self.settings, [1], [1])

    @cached_property
    def keeps_first_apart(self) -> bool:
        """True if the first token of every prompt takes no part in the allocation."""
        return keeps_first_apart(self.adapter, self.components, self.settings, self.adapter.n_layers)


@dataclass(frozen=True)
class Prepared:
    """A prompt as ids (N,), its target looked up, and the positions that are read. ``doubts`` are warnings about it."""

    item: Item
    ids: Tensor
    spec: TargetSpec
    reads: tuple[int, ...]
    is_list: bool
    doubts: tuple[str, ...]


def prepare(asked: Asked, item: Item, told: set[str] | None = None) -> Prepared | FailedPrompt:
    """Encode a prompt and look up its target; a failure where the prompt is at fault.

    Warnings about it are issued, but for those ``told`` before, to which they are added.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            settings = asked.settings
            ids = encode(item.prompt, asked.adapter, asked.tokenizer, settings.chat_template_kwargs)
            spec = parse_target(_target(asked, item), asked.adapter, asked.tokenizer, item.contrast)
            reads = tuple(as_positions(item.position, len(ids)))
            asked.components.check(asked.adapter, [len(ids)])
            _doubt_space(asked, item)
            if asked.keeps_first_apart:
                doubt_first_word([ids[: max(reads) + 1]], asked.tokenizer)
        except OF_A_PROMPT as error:
            return FailedPrompt.of(item.id, error, _ADVICE if _lacks_space(item) else "")
    told = set() if told is None else told
    for warning in said:  # again, to the filters that the user has
        if str(warning.message) not in told:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            told.add(str(warning.message))
    doubts = tuple(str(warning.message) for warning in said)
    return Prepared(item, ids, spec, reads, is_list_of_positions(item.position), doubts)


_ADVICE = " PromptSet.read(..., target_space=True), --target-space, puts a space before targets that follow a word."


def _lacks_space(item: Item) -> bool:
    """True if a target follows a word without a space."""
    targets = item.target if isinstance(item.target, list) else [item.target]
    texts = [one for one in (*targets, item.contrast) if isinstance(one, str)]
    return isinstance(item.prompt, str) and any(spaced(item.prompt, one) != one for one in texts)


def _target(asked: Asked, item: Item) -> Any:
    if asked.target_kind == "logit":
        return item.target
    if item.contrast is not None:
        raise ValueError("contrast: it is subtracted from a logit, and target_kind is 'log-prob'; leave one out.")
    return [LogProb(one) for one in item.target] if isinstance(item.target, list) else LogProb(item.target)


def _doubt_space(asked: Asked, item: Item) -> None:
    """Warn where a target has no space and the token with one, which would follow the prompt, is another."""
    if not isinstance(item.prompt, str) or asked.tokenizer is None:
        return
    if any(lacks_space(text, item.prompt, asked.tokenizer) for text in texts_in([item.target, item.contrast])):
        doubt(
            "target: a target that follows a word has no space in front and is read as it is given; with a space "
            f"it would be another token.{_ADVICE}"
        )
