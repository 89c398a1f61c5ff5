"""The outcomes of prompts: results, or failures, batch by batch or in the prompts' order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..chosen_method import with_method
from ..inputs.prompt_set import Item
from ..methods.attribution import attributions
from ..request import make_request
from .asked import Asked, Prepared, prepare
from .batches import Costs, Limits, batches, windows
from .failed import OF_A_PROMPT, FailedPrompt


class Outcome(NamedTuple):
    """The results of a prompt, one for each position that was read; or its failure, and no results."""

    id: str
    results: list[Any]
    failure: FailedPrompt | None = None
    doubts: tuple[str, ...] = ()
    is_list: bool = False

    @property
    def value(self) -> Any:
        """The outcome as :meth:`depass_fast.DePass.sweep` yields it."""
        if self.failure is not None:
            return self.failure
        return self.results if self.is_list else self.results[0]


def outcomes(
    asked: Asked, items: Iterable[Item], *, most: int | None = None, strict: bool = False, ordered: bool = False
) -> Iterator[list[Outcome]]:
    """Yield the outcomes of prompts, those of a batch together as soon as they are there.

    Args:
        most: prompts at a time; None: as many as pay, and as memory allows.
        strict: raise the error of a prompt.
        ordered: yield those of a window together, in the order of the prompts.
    """
    costs, limits = Costs(asked), Limits.of(asked.adapter.device, most)
    told: set[str] = set()
    for window in windows((_prepared(asked, item, strict, told) for item in items), costs, limits):
        found = {id(one): Outcome(one.id, [], one) for one in window if isinstance(one, FailedPrompt)}
        if found and not ordered:
            yield list(found.values())
        here = Limits.of(asked.adapter.device, most)  # what is free changes
        for batch in batches([one for one in window if isinstance(one, Prepared)], costs, here):
            done = _attributed(asked, batch, strict)
            if ordered:
                found |= {id(prompt): outcome for prompt, outcome in zip(batch, done, strict=True)}
            else:
                yield done
        if ordered:
            yield [found[id(prompt)] for prompt in window]


def _prepared(asked: Asked, item: Item, strict: bool, told: set[str]) -> Prepared | FailedPrompt:
    found = prepare(asked, item, told)
    if strict and isinstance(found, FailedPrompt):
        raise _told(found)
    return found


def _attributed(asked: Asked, batch: Sequence[Prepared], strict: bool) -> list[Outcome]:
    """Return the outcomes of a batch. Where it fails its halves are tried, until the prompt at fault is alone."""
    try:
        results = _results(asked, batch)
    except OF_A_PROMPT as error:
        if len(batch) == 1:
            failure = FailedPrompt.of(batch[0].item.id, error)
            if strict:
                raise _told(failure) from error
            return [Outcome(failure.id, [], failure)]
        failed = error
    else:
        return [_checked(prompt, found, strict) for prompt, found in zip(batch, results, strict=True)]
    if isinstance(failed, torch.OutOfMemoryError):
        del failed  # its traceback holds the tensors of what failed
        with suppress(Exception):
            torch.cuda.empty_cache()
    half = len(batch) // 2
    return [*_attributed(asked, batch[:half], strict), *_attributed(asked, batch[half:], strict)]


def _results(asked: Asked, batch: Sequence[Prepared]) -> list[list[Any]]:
    """Return the results of every prompt of a batch, one for each of its positions."""
    given = (asked.adapter, asked.tokenizer, asked.settings, [prompt.ids for prompt in batch], asked.components)
    with torch.no_grad():
        request = make_request(*given, encoded=True)
        reads, targets = tuple(prompt.reads for prompt in batch), tuple(prompt.spec for prompt in batch)
        return attributions(with_method(replace(request, reads=reads, targets=targets), asked.method))


def _checked(prompt: Prepared, results: list[Any], strict: bool) -> Outcome:
    """Return the outcome of a prompt; scores that are no numbers are a failure."""
    if all(bool(result.scores.isfinite().all()) for result in results):
        return Outcome(prompt.item.id, results, None, prompt.doubts, prompt.is_list)
    failure = FailedPrompt.of(prompt.item.id, FloatingPointError("the scores hold NaN or inf."))
    if strict:
        raise _told(failure)
    return Outcome(failure.id, [], failure)


def _told(failure: FailedPrompt) -> Exception:
    """Return the error of a prompt, with the prompt's name in front."""
    kinds = {kind.__name__: kind for kind in OF_A_PROMPT}
    kind = kinds.get(failure.error, ValueError)
    return kind(f"prompt {failure.id!r}: {failure.reason}")
