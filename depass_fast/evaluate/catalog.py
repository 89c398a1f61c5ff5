"""The studies by their names, without importing them: what each needs, and where its class is."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .study import Study


FEWEST = 10  # prompts that a 95 % interval takes


def check_count(prompts: int, quick: bool) -> None:
    """Raise ValueError for fewer prompts than an interval takes, unless it is the toy size."""
    if prompts < FEWEST and not quick:
        raise ValueError(
            f"prompts: {prompts} are too few for a 95 % interval, which takes {FEWEST}; ask for more, or for the toy "
            "size (--quick), which has no intervals."
        )


@dataclass(frozen=True)
class Entry:
    """A study's name, a line of help, its module and class, and what its files hold (None: it takes none)."""

    name: str
    help: str
    place: tuple[str, str]
    data: str | None = "prompts with their answers"
    train: str | None = None
    takes_layers: bool = False

    def load(self) -> type[Study]:
        """Return the class of the study."""
        module, name = self.place
        return getattr(importlib.import_module(f".studies.{module}", __package__), name)


ENTRIES = (
    Entry("tokens", "which tokens the answer needs: disrupt and recover, AOPC, insertion and deletion, LDS",
          ("tokens", "TokenStudy")),
    Entry("components", "which heads and neurons the answer needs: masked from the top and the bottom, CPR and CMD",
          ("components", "ComponentStudy")),
    Entry("rules", "every rule of sharing and every temperature, by tokens and by neurons", ("rules", "RuleStudy")),
    Entry("truth", "tokens that drive a false answer through a subspace of truthfulness, masked",
          ("truth", "TruthStudy"), data="multiple-choice questions with misleading information",
          train="statements with labels 0 and 1", takes_layers=True),
    Entry("projection", "the agreement of shares over classifiers of several seeds, trained and random",
          ("projection", "ProjectionStudy"), train="statements with labels 0 and 1", takes_layers=True),
    Entry("language", "hidden states split into a language's subspace and the rest, and both decoded",
          ("language", "LanguageStudy"), data="prompts with their answers in several languages",
          train="texts with the number of their language", takes_layers=True),
    Entry("freezing", "the effect of leaving a component out, split into what frozen attention explains and the rest",
          ("freezing", "FreezingStudy")),
    Entry("attention", "attention's own book against what heads do when a token is taken out of their input",
          ("attention", "AttentionStudy")),
    Entry("grouping", "scores of neurons in groups against all at once, with time and peak memory",
          ("grouping", "GroupingStudy"), takes_layers=True),
    Entry("adjoint", "the adjoint sweep against exact scores of every start layer, and its estimate",
          ("adjoint", "AdjointStudy"), takes_layers=True),
)  # fmt: skip
STUDIES = {entry.name: entry for entry in ENTRIES}
