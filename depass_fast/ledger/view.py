"""The look of a ledger: the leading components of every kind, as plain text and in colour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..results.attribution import Attribution
from ..results.interface import Result
from ..results.render import headline, legend, plain_table, rich_table, token_line
from ..runtime.terminal import encodable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group


@dataclass(frozen=True)
class View:
    """The ``top`` leading components of every kind in one target; ``print`` and ``rich.print`` show it.

    ``results`` are those of one prompt at one position, by kind. ``about`` says how they came about, and where there
    are others.
    """

    results: Mapping[str, Result]
    target: int
    top: int
    about: tuple[str, ...]

    def __str__(self) -> str:
        lines = [*self._headlines(), *self.about]
        for result in self.results.values():
            lines += ["", self._title(result), *plain_table(_up_to_position(result).rows(self.target, self.top))]
        return encodable("\n".join(lines))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Group]:
        from rich.console import Group
        from rich.text import Text

        encoding = options.encoding
        parts: list[Any] = [Text(encodable(line, encoding), style="bold") for line in self._headlines()]
        for result in self.results.values():
            parts += ["", Text(self._title(result), style="bold")]
            if result.components == "tokens":
                scores = result.scores_of(self.target).tolist()
                parts += [token_line(result.tokens, scores, encoding), legend(scores[: len(result.tokens)])]
            parts.append(rich_table(_up_to_position(result).rows(self.target, self.top), encoding=encoding))
        yield Group(*parts, "", *(Text(encodable(line, encoding), style="dim") for line in self.about))

    def _headlines(self) -> list[str]:
        return [headline(result, self.target) for result in list(self.results.values())[:1]]

    def _title(self, result: Result) -> str:
        return f"{result.components} at {result.layer_text()}"


def _up_to_position(result: Result) -> Result:
    """Return tokens without those behind the position that is read, which have no share; other results as they are."""
    if not isinstance(result, Attribution) or result.components != "tokens":
        return result
    kept = [m for m in range(len(result.labels)) if not result.position < m < len(result.tokens)]
    return replace(result, labels=[result.labels[m] for m in kept], scores=result.scores[..., kept])
