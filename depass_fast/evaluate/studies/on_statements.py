"""The parts of a study of a classifier of statements: the statements, the layers, and the hidden states there."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

from torch import Tensor

from ..probes import last_hidden_states
from ..statements import Statements, depths, read_statements
from ..study import Study

QUICK_DEPTHS, QUICK_STATEMENTS = (0.5,), 100  # those of the toy size


class OnStatements(Study):
    """A study whose classifier learns from statements. ``depths`` are the parts of the depth where it does."""

    depths: ClassVar[tuple[float, ...]]

    @cached_property
    def _statements(self) -> Statements:
        return read_statements(self.settings.train, QUICK_STATEMENTS if self.settings.quick else None)

    @cached_property
    def _layers(self) -> list[int]:
        parts = QUICK_DEPTHS if self.settings.quick else self.depths
        return self.chosen_layers(depths(self.engine.adapter.n_layers, parts))

    @cached_property
    def _states(self) -> Tensor:
        """The hidden states (S, layers, D) of the statements' last tokens."""
        return last_hidden_states(self.engine, self._statements.texts, self._layers)
