"""A sweep into a folder: prompts that are not done yet, shard by shard, until all are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..inputs.prompt_set import PromptSet
from ..runtime.progress import ProgressBar, progress_bar
from ..runtime.signals import undisturbed
from .asked import Asked
from .dealing import Share
from .dense import Dense
from .folder import ERRORS, SCORES, at_work, check_room, forget_failures, prompts_of, remove_unfinished, write_shard
from .manifest import claim, manifest_of
from .outcomes import Outcome, outcomes
from .rows import Rows


@dataclass(frozen=True)
class Writing:
    """The form of a run's output.

    top: keep so many components of every result, and the sum of the others; None: all. dense: write all scores as
    safetensors, too. shard_prompts, shard_seconds: a shard ends when it holds so many prompts or so much time has
    passed, whichever comes first. most: prompts computed together; None: as many as pay. strict: stop at the first
    prompt that fails. retry_failed: try those that failed in an earlier start again.

    Raises:
        ValueError: a number is out of range.
    """

    top: int | None = None
    dense: bool = False
    shard_prompts: int = 1024
    shard_seconds: float = 30.0
    most: int | None = None
    strict: bool = False
    retry_failed: bool = False

    def __post_init__(self) -> None:
        for name in ("top", "shard_prompts", "most"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{_ARGUMENTS.get(name, name)}: expected a positive integer, got {value!r}.")
        if not self.shard_seconds > 0:
            raise ValueError(f"shard_seconds: expected a positive number, got {self.shard_seconds!r}.")


_ARGUMENTS = {"most": "batch_size"}
SHARD_BYTES = 64 << 20  # of rows and scores, at which a shard ends, too


@dataclass
class Counts:
    """The prompts of a process: all that are its own, those that are finished and failed, and when it began."""

    own: int
    finished: int = 0
    failed: int = 0
    shards: int = 0
    _now: int = 0  # done since it began
    _began: float = field(default_factory=time.monotonic)

    def count(self, outcomes: list[Outcome]) -> None:
        """Count the outcomes of a batch."""
        failed = sum(outcome.failure is not None for outcome in outcomes)
        self.add(len(outcomes) - failed, failed)

    def add(self, finished: int, failed: int) -> None:
        """Count prompts that were finished, and that failed."""
        self.finished, self.failed = self.finished + finished, self.failed + failed
        self._now += finished + failed

    @property
    def done(self) -> int:
        return self.finished + self.failed

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = self._now / seconds
        text = f"{self.done:,} of {self.own:,} prompts, {_rate(rate)}"
        if self._now and self.done < self.own:
            text += f", {_clock((self.own - self.done) / rate)} left"
        return text + (f", {self.failed:,} failed" if self.failed else "")


def _rate(rate: float) -> str:
    return f"{rate:.1f} prompts/s" if rate >= 0.1 else f"{rate * 3600:.1f} prompts/h"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def run(
    asked: Asked,
    prompts: PromptSet,
    folder: Path,
    writing: Writing,
    share: Share,
    report: Callable[[str], None] = lambda line: None,
) -> Counts:
    """Attribute the prompts of a share that the folder's shards do not name yet. ``report`` gets a line per shard.

    Raises:
        ValueError, TypeError: bad input, before any work; another run's folder. With ``strict`` a prompt's error.
        OSError: the disk is full. Everything that was finished is kept.
    """
    asked.check()
    checked = prompts.checked()
    check_room(folder)
    claim(folder, manifest_of(asked, checked, prompts.name, writing.top, writing.dense))
    with at_work(folder, share.rank, share.world) as lock:
        remove_unfinished(folder, lock, share.world)
        if writing.retry_failed:
            forget_failures(folder, share.world)
        return _run(asked, prompts, folder, writing, share, lock, report)


def _run(
    asked: Asked,
    prompts: PromptSet,
    folder: Path,
    writing: Writing,
    share: Share,
    lock: str,
    report: Callable[[str], None],
) -> Counts:
    finished, failed = prompts_of(folder, SCORES), prompts_of(folder, ERRORS)
    own = [item.id for item in prompts if share.owns(item.id)]
    counts = Counts(len(own), sum(id in finished for id in own), sum(id in failed for id in own))
    if writing.strict and counts.failed:
        raise ValueError(f"strict: {counts.failed} prompts failed in an earlier start; retry_failed tries them again.")
    before = finished | failed
    missing = (item for item in prompts if share.owns(item.id) and item.id not in before)
    shown = asked.settings.progress
    with progress_bar("prompts", counts.own, shown) as bar, _shard(folder, lock, writing, counts, report) as shard:
        if bar is not None:
            bar.done = counts.done
        for found in outcomes(asked, missing, most=writing.most, strict=writing.strict):
            counts.count(found)
            shard.add(found)
            _draw(bar, counts)
    return counts


def _draw(bar: ProgressBar | None, counts: Counts) -> None:
    if bar is not None:
        bar.label, bar.done = f"prompts: {counts}", counts.done
        bar.draw(0.0)


def take_in(outcome: Outcome, held: list[Outcome], rows: Rows, dense: Dense | None) -> None:
    """Add the outcome of a prompt to what a shard is made of; its results are not held any longer."""
    held.append(outcome._replace(results=[]))
    if outcome.failure is None:
        rows.add(outcome)
        if dense is not None:
            dense.add(outcome)


@dataclass
class Shard:
    """The shard that is being filled."""

    folder: Path
    lock: str
    writing: Writing
    counts: Counts
    report: Callable[[str], None]

    def __post_init__(self) -> None:
        self._empty()

    def _empty(self) -> None:
        self.outcomes: list[Outcome] = []
        self.rows, self.dense = Rows(self.writing.top), Dense() if self.writing.dense else None
        self.began = time.monotonic()

    def add(self, found: list[Outcome]) -> None:
        """Take in the outcomes of a batch; write the shard if it is full, or has been open for long enough."""
        for outcome in found:
            with undisturbed():  # a prompt is there whole, or not at all
                take_in(outcome, self.outcomes, self.rows, self.dense)
            if self._is_full():
                self.write()
        if self.outcomes and time.monotonic() - self.began >= self.writing.shard_seconds:
            self.write()

    def _is_full(self) -> bool:
        nbytes = self.rows.nbytes + (0 if self.dense is None else self.dense.nbytes)
        return len(self.outcomes) >= self.writing.shard_prompts or nbytes >= SHARD_BYTES

    def write(self) -> None:
        """Write what there is, and begin anew."""
        with undisturbed():
            held, rows, dense = self.outcomes, self.rows, self.dense
            self._empty()  # what cannot be written is not tried twice
            write_shard(self.folder, self.lock, held, rows, dense)
        self.counts.shards += 1
        self.report(f"shard {self.counts.shards}: {len(held):,} prompts; {self.counts}")


@contextmanager
def _shard(folder: Path, lock: str, writing: Writing, counts: Counts, report: Callable[[str], None]) -> Iterator[Shard]:
    """A shard that is written at the end, also after Ctrl-C or an error: what is finished is kept."""
    shard = Shard(folder, lock, writing, counts, report)
    try:
        yield shard
    finally:
        if shard.outcomes:
            shard.write()
