"""The look of attention's explanations: keys by components, as plain text and in colour.

What all keys have in common cancels in the softmax, so that a table of all keys holds shares less their mean over the
keys: what sets one key apart. Of one key or two that were asked for it holds the shares of their logits, and the
difference of the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..labels import shown_tokens
from ..runtime.terminal import encodable
from .attention_interface import Credit, Explanation
from .render import format_scores, heat, pad, plain_table, printable, rows_of_pairs, text_width

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

_KEYS, _COMPONENTS, _HEADS, _TOP = 8, 5, 8, 10
_LABEL, _WIDTH, _GAP = 16, 100, 2  # columns: of a component's label, of plain text, between columns
_VALUES = {"logit": "logit", "contrast": "logit difference", "log-prob": "log P + entropy", "vector": "projection"}


@dataclass(frozen=True)
class _Grid:
    """The leading keys and components of one head: a title, rows of cells below the names of columns, and a note.

    ``heats`` are the cells' sizes relative to the largest share, None where a cell is no share.
    """

    title: str
    rows: list[list[str]]
    heats: list[list[float | None]]
    note: str

    def widths(self) -> list[int]:
        return [max(map(text_width, column)) for column in zip(*self.rows, strict=True)]


def plain(why: Explanation, keys: int = _KEYS, components: int = _COMPONENTS, encoding: str | None = None) -> str:
    """Return a table of the most probable keys and the leading components, for one head or the sharpest of several."""
    lines = [*_warned(why.warnings), _headline(why)]
    shown = _shown(why)
    for number in shown:
        grid = _fitting(why, number, keys, components, _WIDTH, encoding)
        lines += ["", grid.title]
        for row in grid.rows:
            cells = zip(row, grid.widths(), strict=True)
            lines.append("  " + "  ".join(pad(cell, w, right=i > 0) for i, (cell, w) in enumerate(cells)).rstrip())
        lines += [f"  {grid.note}"] if grid.note else []
    return encodable("\n".join([*lines, *_left_out(why, shown), "", _about(why)]), encoding)


@dataclass(frozen=True)
class View:
    """An explanation as rich prints it: orange where a component raises a key's logit, blue where it lowers it."""

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
        shown = _shown(why)
        for number in shown:
            grid = _fitting(why, number, self.keys, self.components, options.max_width, encoding)
            table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
            for i, name in enumerate(grid.rows[0]):
                table.add_column(Text(name, style="dim"), justify="right" if i else "left", no_wrap=True)
            for row, heats in zip(grid.rows[1:], grid.heats, strict=True):
                cells = zip(row, heats, strict=True)
                table.add_row(*(Text(cell, style="" if h is None else heat(h)) for cell, h in cells))
            yield ""
            yield Text(encodable(grid.title, encoding))
            yield table
            if grid.note:
                yield Text(grid.note, style="dim")
        for line in [*_left_out(why, shown), "", _about(why)]:
            yield Text(encodable(line, encoding), style="dim")


@dataclass(frozen=True)
class CreditView:
    """A credit as rich prints it."""

    credit: Credit

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        from rich.text import Text

        yield Text(plain_credit(self.credit, encoding=options.encoding))


def plain_credit(credit: Credit, top: int = _TOP, encoding: str | None = None) -> str:
    """Return the heads whose looking changes every target most, and the components that this is owed to."""
    lines = _warned(credit.warnings)
    for t, (name, kind) in enumerate(zip(credit.target_names, credit.target_kinds, strict=True)):
        total, value = float(credit.total(t).sum()), float(credit.target_logits.reshape(-1)[t])
        place = f"position {credit.position} (after {shown_tokens(credit.tokens)[credit.position]!r})"
        lines += [
            f"{name} at {place}: {_VALUES[kind]} {value:.4f}",
            f"what heads add to it by looking where they look, not evenly: {total:+.4f}, all heads together. Heads",
            "overlap: a change is no part of that value",
            "",
            "heads",
            *plain_table(rows_of_pairs(credit.top_heads(top, t)), encoding),
            "",
            f"{credit.components} at layer {credit.layer}, all heads together",
            *plain_table(rows_of_pairs(credit.top(top, t)), encoding),
            "",
        ]
    about = (
        f"attention of layers {credit.layers[0]} to {credit.layers[-1]} | {credit.rule} | {credit.backend} on "
        f"{credit.device}, {credit.dtype} | completeness error {credit.completeness_error:.1e} | {credit.seconds:.2f} s"
    )
    return encodable("\n".join([*lines, about]), encoding)


def _headline(why: Explanation) -> str:
    heads = f"head {why.heads[0]}" if len(why.heads) == 1 else f"{len(why.heads)} heads"
    token = shown_tokens(why.tokens)[why.query]
    return f"layer {why.layer}, {heads}: why {token!r} at position {why.query} looks where it looks"


def _about(why: Explanation) -> str:
    less = ", less their mean over the keys" if why.asked == "all" else ""
    return (
        f"{why.components} at layer {why.start}: shares of the logits, half by the query and half by the key{less}\n"
        f"{why.allocation} | {why.backend} on {why.device}, {why.dtype} | completeness error "
        f"{why.completeness_error:.1e} | {why.seconds:.2f} s"
    )


def _warned(warnings: Sequence[str] | None) -> list[str]:
    return [f"WARNING: {text}." for text in warnings or []]


def _shown(why: Explanation) -> list[int]:
    """Return which of the heads are shown: the sharpest, in their order."""
    if len(why.heads) <= _HEADS:
        return list(range(len(why.heads)))
    return sorted(why.entropy.argsort()[:_HEADS].tolist())


def _left_out(why: Explanation, shown: Sequence[int]) -> list[str]:
    count = len(why.heads) - len(shown)
    return ["", f"{count} more head{'s' * (count > 1)}, which look less sharply"] if count else []


def _fitting(why: Explanation, number: int, keys: int, components: int, width: int, encoding: str | None) -> _Grid:
    """Return the grid with as many components as fit into ``width`` columns: numbers are never cut."""
    for count in range(min(components, len(why.labels)), 0, -1):
        grid = _grid(why, number, keys, count, encoding)
        if sum(grid.widths()) + _GAP * len(grid.widths()) <= width:
            return grid
    return _grid(why, number, keys, 1, encoding)


def _grid(why: Explanation, number: int, n_keys: int, n_components: int, encoding: str | None) -> _Grid:
    p, shares, sums = (_of(why, x, number) for x in (why.probabilities, why.shares, why.scores))
    order = list(range(len(p)))
    if why.asked == "all":
        shares, sums = shares - shares.mean(0), sums - sums.mean()
        order = p.argsort(descending=True, stable=True)[:n_keys].tolist()
    names = [_key(why, why.keys[at]) for at in order]
    shares, sums, odds = shares[order], sums[order], [f"{float(p[at]):.1%}" for at in order]
    ranked = shares.abs().amax(0)
    if why.asked == "pair":
        shares, sums = (torch.cat([x, (x[0] - x[1])[None]]) for x in (shares, sums))
        names.append("the first less the second")
        odds.append("")
        ranked = shares[-1].abs()
    leading = ranked.argsort(descending=True, stable=True)[:n_components].tolist()
    table = torch.cat([shares[:, leading], (sums - shares[:, leading].sum(1))[:, None], sums[:, None]], 1)
    cells, wide = format_scores(table.flatten().tolist()), table.shape[1]
    largest = float(shares[:, leading].abs().max())
    head = ["key", "P", *(_short(why.labels[m]) for m in leading), "others", "sum" if why.asked == "all" else "logit"]
    rows = [[names[i], odds[i], *cells[i * wide : (i + 1) * wide]] for i in range(len(names))]
    heats: list[list[float | None]] = [
        [None, None, *(float(x) / largest if largest else 0.0 for x in row), None, None] for row in shares[:, leading]
    ]
    rest, left = len(p) - len(order), float(p.sum() - p[order].sum())
    note = f"{rest} more key{'s' * (rest > 1)}, {max(0.0, left):.1%}" if rest else ""
    texts = [[encodable(x, encoding) for x in row] for row in [head, *rows]]
    return _Grid(f"head {why.heads[number]}", texts, heats, note)


def _of(why: Explanation, x: Tensor, number: int) -> Tensor:
    return x if why.one_head else x[number]


def _key(why: Explanation, key: int) -> str:
    return printable(f"{shown_tokens(why.tokens)[key]!r}@{key}")


def _short(label: str) -> str:
    """Return a label of at most :data:`_LABEL` columns; the position at its end is kept."""
    label = printable(label)
    if text_width(label) <= _LABEL:
        return label
    end = re.search(r"@\d+$", label)
    tail = end[0] if end else ""
    cut = label[: len(label) - len(tail)]
    while cut and text_width(cut) + len(tail) + 1 > _LABEL:
        cut = cut[:-1]
    return f"{cut}…{tail}"
