"""The look of a result: as plain text (``str(result)``) and in colour (``rich.print(result)``).

Where text goes may lack characters: ``encoding`` is its encoding, and what that lacks is escaped before it is aligned
(:mod:`depass_fast.runtime.terminal`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..labels import shown_tokens
from ..linear_rules import LINEAR_RULES
from ..runtime.brief import brief, cut
from ..runtime.terminal import NEGATIVE_BAR, POSITIVE_BAR, SHORTEST_BAR, encodable, text_width
from .interface import Result, Row

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group
    from rich.table import Table
    from rich.text import Text

_WIDTH = 100  # columns of plain text
_BAR = 24  # columns of the longest bar
_LONG = 128  # tokens beyond which plain text shows a table instead of the prompt
_TOP = 10
_SHOWN, _READ = 3, 160  # in a repr: targets and leading components, characters of a part

# the value that shares sum to, by the kind of target
VALUES = {
    "logit": "logit",
    "contrast": "logit difference",
    "log-prob": "log P + entropy",
    "vector": "projection",
    "attention": "credit of attention",
}

# Two of the colours of plots.look, legible on dark and on light terminals: as text, and as a background under white
# text. rich takes the nearest ones where a terminal has 256 or 16.
POSITIVE, NEGATIVE, _NEUTRAL = (189, 78, 0), (0, 115, 192), (112, 112, 118)
_FAINT = 0.03  # of the largest share; below it a token keeps the terminal's own colours


def plain(result: Result, top: int | None = None, encoding: str | None = None) -> str:
    """Return a short text: what was read out, then the prompt with every token's share, or the leading components.

    ``top`` asks for a table of that many components (default: 10, and for tokens the prompt instead). ``encoding`` is
    by default that of standard output.
    """
    as_prompt = result.components == "tokens" and len(result.tokens) <= _LONG
    text = [*_warned(result), *(headline(result, k) for k in _targets(result)), about(result)]
    if as_prompt:
        text += ["", *aligned(result, encoding=encoding)]
    for k in _targets(result) if top or not as_prompt else ():
        title = [result.target_names[k]] if len(_targets(result)) > 1 else []
        text += ["", *title, *plain_table(result.rows(k, top or _TOP), encoding)]
    return encodable("\n".join(text), encoding)


def short(result: Result) -> str:
    """Return the ``repr`` of a result, one line: what was read out, the leading components, how it came about."""
    targets = list(_targets(result))
    read = [cut(headline(result, k), _READ) for k in targets[:_SHOWN]]
    read += [f"{len(targets) - _SHOWN} targets more"] if len(targets) > _SHOWN else []
    leading = ", ".join(f"{brief(label)[1:-1]} {score:+.4g}" for label, score in result.top(_SHOWN))
    warned = [f"WARNING: {text}" for text in result.warnings or []]
    parts = [cut("; ".join(warned), _READ)] if warned else []
    parts += [*read, f"leading: {cut(leading, _READ)}", about(result)]
    parts += [f"made with {result.provenance.told()}"] if result.provenance is not None else []
    return encodable(f"{type(result).__name__}({' | '.join(cut(part, 2 * _READ) for part in parts)})")


def rich_view(result: Result, top: int | None = None) -> View:
    """Return the same in colour, for rich.

    Tokens are shown as the prompt, orange where a token raises the target's logit, blue where it lowers it. A table of
    the ``top`` (default 10) leading components per target follows.
    """
    return View(result, top)


@dataclass(frozen=True)
class View:
    """A result as rich prints it, on a console of any encoding."""

    result: Result
    top: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Group]:
        from rich.console import Group
        from rich.text import Text

        result, encoding = self.result, options.encoding
        parts: list[Any] = [Text(encodable(line, encoding), style="bold red") for line in _warned(result)]
        for k in _targets(result):
            parts += [Text(encodable(headline(result, k), encoding), style="bold"), ""]
            if result.components == "tokens":
                scores = result.scores_of(k).tolist()
                parts += [
                    token_line(shown_tokens(result.tokens), scores, encoding),
                    legend(scores[: len(result.tokens)]),
                    "",
                ]
            parts += [rich_table(result.rows(k, self.top or _TOP), encoding=encoding), ""]
        yield Group(*parts, Text(encodable(about(result), encoding), style="dim"))


@dataclass(frozen=True)
class TextAbove:
    """A text and a result below it as rich prints them, on a console of any encoding."""

    text: str
    result: Result

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        from rich.text import Text

        yield Text(encodable(self.text, options.encoding))
        yield ""
        yield View(self.result)


def about(result: Result) -> str:
    """Return one line on how a result came about; options that differ from what is usual are told."""
    rule = result.allocation + (f" T = {result.temperature:g}" if result.allocation == "softmax" else "")
    how = result.method + (f" ({result.estimate})" if result.estimate else "")
    if result.is_exact and result.method != "exact":
        how = "exact, by one way back"
    verified = "" if result.verification is None else f"verified: {result.verification} | "
    rule += ", activations of values shared" if result.value_activation == "shared" else ""
    at = "" if result.written_at is None else f", written at {brief(result.written_at)}"
    end = "" if result.end is None else f" read entering layer {result.end}"
    return (
        f"{result.components} at {result.layer_text()}{at}{end} | {how} | {rule}{_excluded(result)} | "
        f"{result.backend} on {result.device}, {_dtypes(result)} | "
        f"completeness error {result.completeness_error:.1e} | {verified}{result.seconds:.2f} s"
    )


def _excluded(result: Result) -> str:
    """Return the special tokens in words; nothing where only the first token is kept out, as it is by default."""
    kept_out = result.exclude_special
    of_no_use = result.allocation in LINEAR_RULES  # which keep nothing out
    if result.components != "tokens" or kept_out is None or kept_out == [0] or of_no_use:
        return ""
    return f", special tokens {brief(kept_out)} kept out" if kept_out else ", no special tokens kept out"


def _dtypes(result: Result) -> str:
    """Return the dtype of the model, and those of state and products where they differ from it."""
    others = (("state", result.state_dtype), ("products", result.compute_dtype))
    told = [f"{name} {dtype}" for name, dtype in others if dtype not in (None, result.dtype)]
    return result.dtype + (f" ({', '.join(told)})" if told else "")


def _warned(result: Result) -> list[str]:
    more = " These scores are approximate; see docs/adjoint.md." if not result.is_exact else ""
    return [f"WARNING: {text}.{more}" for text in result.warnings or []]


def token_line(tokens: Sequence[str], scores: Sequence[float], encoding: str = "utf-8") -> Text:
    """Return the prompt as one line; a token's background is orange or blue, the stronger the larger its |share|."""
    from rich.text import Text

    line, largest = Text(), max((abs(s) for s in scores[: len(tokens)]), default=0.0)
    for token, score in zip(tokens, scores, strict=False):
        line.append(encodable(printable(token), encoding), style=heat(score / largest if largest else 0.0))
    return line


def legend(scores: Sequence[float]) -> Text:
    """Return a scale that explains the colours of :func:`token_line` for these scores."""
    from rich.text import Text

    largest = max((abs(s) for s in scores), default=0.0)
    low, high = format_scores([-largest, largest])
    line = Text()
    line.append(f" {low} ", style=heat(-1.0))
    for step in (-0.6, -0.2, 0.2, 0.6):
        line.append("   ", style=heat(step))
    line.append(f" {high} ", style=heat(1.0))
    return line


def aligned(result: Result, width: int = _WIDTH, encoding: str | None = None) -> list[str]:
    """Return the prompt of a token attribution in lines of ``width`` columns, with its shares under every token."""
    heads = [printable(t) if t.strip() else repr(t) for t in shown_tokens(result.tokens)] + result.labels[
        len(result.tokens) :
    ]
    heads = [encodable(head, encoding) for head in heads]
    flat = format_scores([score for k in _targets(result) for score in result.scores_of(k).tolist()])
    rows = [flat[k * len(heads) : (k + 1) * len(heads)] for k in _targets(result)]
    names = [""] if len(rows) == 1 else [encodable(name, encoding) for name in result.target_names]
    margin = max(map(text_width, names))
    columns = [[head, *(row[m] for row in rows)] for m, head in enumerate(heads)]
    lines: list[str] = []
    current = ["  " + pad(name, margin) for name in ["", *names]]
    start = list(current)
    for column in columns:
        wide = max(map(text_width, column))
        if current != start and text_width(current[0]) + 2 + wide > width:
            lines += [*(line.rstrip() for line in current), ""]
            current = list(start)
        current = [line + "  " + pad(cell, wide, right=True) for line, cell in zip(current, column, strict=True)]
    return [*lines, *(line.rstrip() for line in current)]


def rich_table(rows: Sequence[Row], width: int = _BAR, encoding: str = "utf-8") -> Table:
    """Return a table of label, share and bar of every row; the longest bar takes ``width`` columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    largest = max((abs(row.score) for row in rows if row.ranked), default=0.0)
    for row, number in zip(rows, format_scores([row.score for row in rows]), strict=True):
        colour = _rgb(POSITIVE if row.score > 0 else NEGATIVE)
        length = encodable(score_bar(row.score, largest, width, POSITIVE_BAR) if row.ranked else "", encoding)
        style, label = "" if row.ranked else "dim", encodable(row.label, encoding)
        table.add_row(Text(label, style=style), Text(number, style=style), Text(length, style=colour))
    return table


def rows_of_pairs(pairs: Sequence[tuple[str, float]]) -> list[Row]:
    """Return (label, score) pairs, as ``result.top`` gives them, as rows of :func:`rich_table`."""
    return [Row(label, score) for label, score in pairs]


def format_scores(scores: Sequence[float]) -> list[str]:
    """Return signed numbers with the same number of decimals: four significant digits of the largest."""
    largest = max((abs(s) for s in scores), default=0.0)
    if not largest or not math.isfinite(largest) or largest < 1e-6 or largest >= 1e7:
        return [f"{s:+.3e}" if s else "0" for s in scores]
    decimals = max(0, 3 - math.floor(math.log10(largest)))
    return [f"{s:+.{decimals}f}" if round(s, decimals) else f"{0:.{decimals}f}" for s in scores]


def score_bar(score: float, largest: float, width: int = _BAR, fill: str | None = None) -> str:
    """Return a bar of length |score| / largest; by default full blocks where positive, shaded ones where negative."""
    length = round(width * abs(score) / largest) if largest else 0
    return (fill or (POSITIVE_BAR if score > 0 else NEGATIVE_BAR)) * length or (SHORTEST_BAR if score else "")


def printable(token: str) -> str:
    """Return the text of a token with line breaks and other invisible characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)


def _targets(result: Result) -> range:
    return range(len(result.target_names))


def headline(result: Result, target: int) -> str:
    """Return the target, the position where it was read out, and its value."""
    if result.reduced is not None:
        return _reduced_headline(result, result.reduced)
    at = f"position {result.position} (after {shown_tokens(result.tokens)[result.position]!r})"
    what = value_name(result, target)
    return f"{result.target_names[target]} at {at}: {what} {result.target_logits.reshape(-1)[target].item():.4f}"


def value_name(result: Result, target: int) -> str:
    """Return the name of the value that shares sum to: "logit", say."""
    if result.reduced is not None:
        return "projection"
    if result.target_kinds is not None:
        return VALUES[result.target_kinds[target]]
    if result.target_ids[target] is None:
        return "projection"
    return "logit" if result.contrast_ids[target] is None else "logit difference"


def _reduced_headline(result: Result, reduced: dict[str, Any]) -> str:
    """Return what a reduced continuation sums up, where, and the parts of its value."""
    first, last = reduced["prompt_length"] - 1, result.position
    at = f"position {last}" if first == last else f"{reduced['tokens']} positions ({first} to {last})"
    parts = f"log P {reduced['log_prob']:.4f}, entropy {reduced['entropy']:.4f}"
    return f"{result.target_names[0]}, at {at}: projection {result.target_logits.item():.4f} ({parts})"


def plain_table(rows: Sequence[Row], encoding: str | None = None) -> list[str]:
    """Return lines of label, share and bar of every row; none for no rows."""
    numbers, labels = format_scores([row.score for row in rows]), [encodable(row.label, encoding) for row in rows]
    label, number = max(map(text_width, labels), default=0), max(map(len, numbers), default=0)
    largest = max((abs(row.score) for row in rows if row.ranked), default=0.0)
    return [
        f"  {pad(name, label)}  {text:>{number}}  {score_bar(row.score, largest) if row.ranked else ''}".rstrip()
        for row, name, text in zip(rows, labels, numbers, strict=True)
    ]


def heat(t: float) -> str:
    """Return the style of a share ``t`` in -1 to 1: from grey to full colour, white text."""
    if abs(t) < _FAINT:
        return ""
    end = POSITIVE if t > 0 else NEGATIVE
    mixed = (round(a + (b - a) * min(abs(t), 1.0)) for a, b in zip(_NEUTRAL, end, strict=True))
    return f"rgb(255,255,255) on {_rgb(mixed)}"


def _rgb(colour: Any) -> str:
    return "rgb({},{},{})".format(*colour)


def pad(text: str, width: int, right: bool = False) -> str:
    """Return a text filled up with spaces to ``width`` columns."""
    space = " " * max(0, width - text_width(text))
    return space + text if right else text + space
