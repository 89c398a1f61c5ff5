"""A study: what it needs, the items that it measures one at a time, and how it sums up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from ..engine import DePass
from .questions import Question, answered, read_texts
from .tables import Panel, Table

Row: TypeAlias = dict[str, Any]  # JSON values


@dataclass(frozen=True)
class Settings:
    """The choices of a run.

    data: the file of prompts; None: the demo model's own. train: the file that a classifier learns from. prompts: how
    many items are measured. layers: those that a study of layers looks at; None: its own choice. quick: the toy size.
    """

    data: Path | None = None
    train: Path | None = None
    prompts: int = 100
    layers: tuple[int, ...] | None = None
    seed: int = 0
    quick: bool = False


@dataclass(frozen=True)
class Item:
    """One thing to be measured. ``key`` tells it from the others, the same in every run."""

    key: str
    value: Any


class Study(ABC):
    """A study. One object serves one run.

    ``name`` is that of the command, ``title`` that of its section. ``version`` is raised when rows change their
    meaning: a run that was cut short under another one is not gone on with.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    version: ClassVar[int] = 1
    answered_only: ClassVar[bool] = True  # items are prompts that the model answers: their part is its accuracy

    def __init__(self, engine: DePass, settings: Settings) -> None:
        self.engine, self.settings = engine, settings

    @abstractmethod
    def items(self) -> Iterator[Item | None]:
        """Yield what is to be measured, in one order always; None for a prompt that the model does not answer.

        It may train a classifier first. The run stops it after as many items as are asked for.
        """

    @abstractmethod
    def measure(self, item: Item) -> Row:
        """Return the figures of one item, as JSON values."""

    @abstractmethod
    def summary(self, rows: Sequence[Row]) -> Row:
        """Return what all rows say together, with intervals, as JSON values."""

    def chosen_layers(self, default: Iterable[int]) -> list[int]:
        """Return the layers that the run is asked for, else ``default``; each once, in order.

        Raises:
            ValueError: the model has no such layer.
        """
        count, given = self.engine.adapter.n_layers, self.settings.layers
        if given is not None and not all(0 <= layer < count for layer in given):
            raise ValueError(f"layers: {list(given)} are asked for; the model has 0 to {count - 1}.")
        return sorted(set(default if given is None else given))

    def depends_on(self) -> Row:
        """Return what rows depend on beside the model, the files and the settings: another run must agree in it."""
        return {}

    def facts(self) -> Row:
        """Return what the result says about the run beside its figures: a classifier's accuracy, the shares used."""
        return {}

    @staticmethod
    @abstractmethod
    def tables(result: Row) -> list[Table]:
        """Return the tables of a result, whole as it is written."""

    @staticmethod
    def panels(result: Row) -> list[Panel]:
        """Return the picture of a result, a panel beside the other; none for a study without curves."""
        return []


class QuestionStudy(Study):
    """A study whose items are the questions that the model answers."""

    task: ClassVar[str] = "ioi"  # the demo model's prompts, where no file is given

    def items(self) -> Iterator[Item | None]:
        for question in answered(self.engine, read_texts(self.settings.data, self.task)):
            yield None if question is None else Item(str(question.number), question)

    def seed_of(self, question: Question) -> int:
        """Return the seed of a question's random draws."""
        return self.settings.seed * 100_003 + question.number
