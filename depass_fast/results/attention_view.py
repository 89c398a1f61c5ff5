"""The look of attention's explanations: keys by components, as plain text and in colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..runtime.terminal import encodable
from .render import format_scores, heat, pad, plain_table, printable, rows_of_pairs, text_width

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

    from .attention_interface import Credit, Explanation

_KEYS, _COMPONENTS, _HEADS, _TOP = 8, 5, 8, 10
_LABEL = 16  # columns of a component's label


@dataclass(frozen=True)
class _Grid:
    """The leading keys and components of one head: a title, the names of the columns, and rows of cells.

    ``heats`` are the cells' sizes relative to the largest share, None where a cell is no share.
    """

    title: str
    names: list[str]
    rows: list[list[str]]
    heats: list[list[float | None]]


def plain(why: Explanation, keys: int = _KEYS, components: int = _COMPONENTS) -> str:
    """Return a table of the most probable keys and the leading components, for one head or the sharpest of several."""
    lines = [*_warned(why.warnings), _headline(why)]
    for number in _shown(why):
        grid = _grid(why, number, keys, components)
        cells = [[encodable(cell) for cell in row] for row in [grid.names, *grid.rows]]
        widths = [max(map(text_width, column)) for column in zip(*cells, strict=True)]
        lines += ["", grid.title]
        for row in cells:
            first, *others = (
                pad(cell, width, right=i > 0) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  " + "  ".join([first, *others]).rstrip())
    return encodable("\n".join([*lines, "", _about(why)]))


@dataclass(frozen=True)
class View:
    """An explanation as rich prints it: red where a component raises a key's logit, blue where it lowers it."""

    why: Explanation
    keys: int = _KEYS
    components: int = _COMPONENTS

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        from rich.table import Table
        from rich.text import Text

        why, encoding = self.why, options.encoding
        for line in _warned(why.warnings):
            yield Text(encodable(line, encoding), style="bold red")
        yield Text(encodable(_headline(why), encoding), style="bold")
        for number in _shown(why):
            grid = _grid(why, number, self.keys, self.components)
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
            for i, name in enumerate(grid.names):
                table.add_column(
                    Text(encodable(name, encoding), style="dim"), justify="right" if i else "left", no_wrap=True
                )
            for row, heats in zip(grid.rows, grid.heats, strict=True):
                cells = zip(row, heats, strict=True)
                table.add_row(
                    *(Text(encodable(cell, encoding), style="" if h is None else heat(h)) for cell, h in cells)
                )
            yield ""
            yield Text(encodable(grid.title, encoding))
            yield table
        yield ""
        yield Text(encodable(_about(why), encoding), style="dim")


def plain_credit(credit: Credit, top: int = _TOP) -> str:
    """Return the heads whose looking changes every target most, and the components that this is owed to."""
    lines = _warned(credit.warnings)
    for t, name in enumerate(credit.target_names):
        total, logit = float(credit.total(t).sum()), float(credit.target_logits.reshape(-1)[t])
        lines += [
            f"{name} at position {credit.position} (after {credit.tokens[credit.position]!r}): logit {logit:.4f}, of "
            f"which {total:+.4f} is owed to where heads look",
            "",
            "heads",
            *plain_table(rows_of_pairs(credit.top_heads(top, t))),
            "",
            f"{credit.components} at layer {credit.layer}",
            *plain_table(rows_of_pairs(credit.top(top, t))),
            "",
        ]
    about = (
        f"attention of layers {credit.layers[0]} to {credit.layers[-1]} | {credit.rule} | {credit.backend} on "
        f"{credit.device}, {credit.dtype} | completeness error {credit.completeness_error:.1e} | {credit.seconds:.2f} s"
    )
    return encodable("\n".join([*lines, about]))


def _headline(why: Explanation) -> str:
    heads = f"head {why.heads[0]}" if len(why.heads) == 1 else f"{len(why.heads)} heads"
    return f"layer {why.layer}, {heads}: why {why.tokens[why.query]!r} at position {why.query} looks where it looks"


def _about(why: Explanation) -> str:
    return (
        f"{why.components} at layer {why.start}, half of each side | {why.allocation} | {why.backend} on {why.device}, "
        f"{why.dtype} | completeness error {why.completeness_error:.1e} | {why.seconds:.2f} s"
    )


def _warned(warnings: Sequence[str] | None) -> list[str]:
    return [f"WARNING: {text}." for text in warnings or []]


def _shown(why: Explanation) -> list[int]:
    """Return which of the heads are shown: the sharpest, in their order."""
    if len(why.heads) <= _HEADS:
        return list(range(len(why.heads)))
    return sorted(why.entropy.argsort()[:_HEADS].tolist())


def _grid(why: Explanation, number: int, n_keys: int, n_components: int) -> _Grid:
    p, logits, shares = (_of(why, x, number) for x in (why.probabilities, why.scores, why.shares))
    order = p.argsort(descending=True, stable=True)[:n_keys].tolist()
    strongest = shares[order].abs().amax(0)
    leading = strongest.argsort(descending=True, stable=True)[:n_components].tolist()
    largest = float(shares[order].abs().max())
    flat = format_scores([*shares[order][:, leading].flatten().tolist(), *logits[order].tolist()])
    others = (logits[order] - shares[order][:, leading].sum(1)).tolist()
    rest = format_scores([*others, largest])[:-1]
    rows, heats = [], []
    width = len(leading)
    for i, at in enumerate(order):
        key = why.keys[at]
        name = printable(why.tokens[key]) if why.tokens[key].strip() else repr(why.tokens[key])
        shown = flat[i * width : (i + 1) * width]
        rows.append([f"{key} {name}", f"{float(p[at]):.1%}", *shown, rest[i], flat[len(order) * width + i]])
        sizes = [float(shares[at, m]) / largest if largest else 0.0 for m in leading]
        heats.append([None, None, *sizes, None, None])
    names = ["key", "P", *(_short(why.labels[m]) for m in leading), "others", "logit"]
    return _Grid(f"head {why.heads[number]}", names, rows, heats)


def _of(why: Explanation, x: Tensor, number: int) -> Tensor:
    return x if why.one_head else x[number]


def _short(label: str) -> str:
    return printable(label) if len(label) <= _LABEL else printable(label[: _LABEL - 1]) + "…"
