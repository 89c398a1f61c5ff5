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
