"""The engine and what it holds, and a request: shared by the groups of calls of :class:`depass_fast.DePass`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from .adapters import Adapter
from .components.base import ComponentKind
from .inputs.prompts import Prompt
from .options import Options, OptionValues
from .request import Request
from .trace.record import Trace


class Calls(ABC):
    """A group of calls of an engine."""

    adapter: Adapter
    tokenizer: Any
    options: Options

    @abstractmethod
    def _request(
        self,
        prompt: Prompt | Sequence[Prompt] | Trace,
        components: ComponentKind,
        end: int | str | None,
        options: OptionValues,
    ) -> Request:
        """Return the request of a call, checked."""

    def _of_all(self, options: OptionValues, call: str) -> Options:
        """Return the options of a call whose result holds states. ValueError where no rank holds all of them."""
        settings = self.options.updated(options)
        if settings.shard is not None:
            raise ValueError(
                f"shard: {call} needs the states of all components, of which every rank holds its own part; give "
                f"{call}(..., shard=None), with which each process carries all. attribute() is for shards."
            )
        return settings
