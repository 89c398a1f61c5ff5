"""Tables of a result, in print and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """A title, a header and rows of texts. The first ``left`` columns are left-aligned; ``note`` explains the cells."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    note: str = ""

    def markdown(self) -> str:
        """Return the table in Markdown, its title and its note above it."""
        above = f"**{self.title}.** {self.note}".rstrip()
        return f"{above}\n\n{markdown(self.header, self.rows, self.left)}"

    def plain(self) -> str:
        """Return the table as aligned lines of text."""
        lines = [self.header, *self.rows]
        widths = [max(len(cells[i]) for cells in lines) for i in range(len(self.header))]
        made = [
            "  ".join(
                c.ljust(w) if i < self.left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            )
            for cells in lines
        ]
        head = f"{self.title}. {self.note}".rstrip()
        return "\n".join([head, "", *(line.rstrip() for line in made)])


@dataclass(frozen=True)
class Panel:
    """Curves or points for a picture: lines and points by name, (x, y) each; bands by name, (x, low, high)."""

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    bands: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]] = field(default_factory=dict)
    log_y: bool = False
    log_x: bool = False
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Return a Markdown table, the first ``left`` columns left-aligned."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in [header, rule, *rows]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def figure(found: Mapping[str, float | int | bool | None], digits: int = 3) -> str:
    """Return a mean with its interval as text: "0.233 [0.201, 0.262]"; without an interval the mean alone."""
    middle, low, high = found["mean"], found["low"], found["high"]
    if middle is None:
        return "-"
    if low is None or high is None:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
