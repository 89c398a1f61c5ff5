"""Results as pictures: which numbers are drawn, and the words above them. docs/plots.md shows each.

Drawing itself is the business of :mod:`depass_fast.plots`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..labels import BIAS, REST, shown_labels, shown_tokens, text_of_tokens
from ..plots.bars import Bar, columns, grouped, rows
from ..plots.curve import cumulative
from ..plots.frame import Caption
from ..plots.heat import Table, heat
from ..plots.look import checked_limit, colours_of, inches
from ..plots.places import leading_columns, token_labels
from ..plots.strip import strip
from ..runtime.numbers import as_index
from .interface import Result
from .render import format_scores, headline, value_name

_OF_TOKENS = ("tokens", "strip")
_GROUP = 3  # components of a layer that are drawn as a group of bars


class Look(NamedTuple):
    """The user's wishes: Axes, the number of leading components, the width, the colours of a heat map or
    strip, the score where they are full, and whether title and sums are written."""

    ax: Any = None
    top: int = 20
    width: str | float | None = None
    cmap: Any = None
    limit: float | None = None
    caption: bool = True

    def said(self, caption: Caption) -> Caption:
        """Return the words above the picture; without a caption these are the warnings alone."""
        return caption if self.caption else Caption("", (), caption.warnings)

    def checked(self) -> Look:
        """Return this, whether the picture needs each wish or not.

        Raises:
            TypeError, ValueError: ``top`` is no positive number, the width none, the limit none, or the map unknown.
        """
        if as_index(self.top, "top") < 1:
            raise ValueError(f"top: {self.top} is out of range; it must be at least 1.")
        inches(self.width)
        checked_limit(self.limit)
        colours_of(self.cmap)
        return self


def chosen(kind: str | None, default: str, kinds: Sequence[str], what: str) -> str:
    """Return the kind of picture. Raises ValueError where there is no such picture of ``what``."""
    kind = default if kind is None else kind
    if kind not in kinds:
        raise ValueError(f"kind: {kind!r} is not a picture of {what}; there are {', '.join(map(repr, kinds))}.")
    return kind


def draw_layer(result: Any, kind: str | None, target: int, look: Look) -> Any:
    """Draw an :class:`depass_fast.Attribution`; return the Axes."""
    is_tokens, several = result.components == "tokens", result.scores.ndim > 1
    kinds = [*(_OF_TOKENS if is_tokens else ()), "leading", "curve", *(["targets"] if several else [])]
    kind = chosen(kind, kinds[0], kinds, f"{result.components} at {result.layer_text()}")
    scores, look = result.scores_of(target).tolist(), look.checked()
    named = len(scores) - result.n_extras
    value = _value(result, target)
    if kind == "targets":
        return _targets(result, look)
    if kind == "curve":
        caption = caption_of(result, target, [f"Σ |share| {math.fsum(map(abs, scores[:named])):.4g}"])
        return cumulative({"": scores[:named]}, result.components, look.said(caption), look.ax, look.width)
    if kind == "leading":
        found = bars_of(result.rows(target, look.top)[:-1], result.tokens)
        caption = caption_of(result, target, [_summed("bars", [bar.value for bar in found], value)])
        return rows(found, f"share of the {value_name(result, target)}", look.said(caption), look.ax, look.width)
    return _in_order(result, kind, target, look, value)


def _in_order(result: Any, kind: str, target: int, look: Look, value: float) -> Any:
    """Draw tokens in their order, as bars or as text."""
    scores = result.scores_of(target).tolist()
    n, split = len(result.tokens), value_name(result, target)
    extras = list(zip(result.labels[n:], scores[n:], strict=True))
    if kind == "strip":
        beside = "".join(f"; {label} {score:+.4g} is not drawn" for label, score in extras)
        caption = caption_of(result, target, [_summed("tokens" if not beside else "shares", scores, value) + beside])
        return strip(result.tokens, scores[:n], "share", look.said(caption), look.ax, look.width, look.cmap, look.limit)
    read = min(n, result.position + 1)  # what comes later has no share
    bars = [Bar(*one) for one in zip(token_labels(result.tokens[:read]), scores[:read], strict=True)]
    bars += [Bar(label, score, ranked=False) for label, score in extras]
    caption = caption_of(result, target, [_summed("bars", scores, value)])
    return columns(bars, f"share of the {split}", look.said(caption), look.ax, look.width)


def _targets(result: Any, look: Look) -> Any:
    """Draw all targets as rows of a heat map."""
    is_tokens = result.components == "tokens"
    n = len(result.tokens)
    labels = [*token_labels(result.tokens), *result.labels[n:]] if is_tokens else result.labels
    table = [result.scores_of(k).tolist() for k in range(len(result.target_names))]
    values, labels, extras = leading_columns(table, labels, result.n_extras, None if is_tokens else 2 * look.top)
    sums = ["each row sums to its target's value"]
    caption = caption_of(result, 0, sums, f"{len(table)} targets {_at(result)}")
    made = Table(values, result.target_names, labels, "target", result.components, extras)
    return heat(made, "share", look.said(caption), look.ax, look.width, look.cmap, look.limit)


def draw_layers(result: Any, kind: str | None, target: int, look: Look) -> Any:
    """Draw a :class:`depass_fast.LayeredAttribution`; return the Axes."""
    counts = {len(one.labels) - one.n_extras for one in result.by_layer}
    tabular = len(counts) == 1
    kinds = [*(["heat"] if tabular else []), *(["layers"] if tabular and max(counts) <= _GROUP else [])]
    kinds += ["leading", "curve"]
    default = "layers" if "layers" in kinds else "heat" if result.components == "heads" and tabular else "leading"
    kind, look = chosen(kind, default, kinds, f"{result.components} of these layers"), look.checked()
    several = [] if len(result.layers) == 1 else ["layers overlap: their shares are not to be added"]
    if kind == "leading":
        found = bars_of(result.rows(target, look.top), result.tokens)
        count = len(result.labels)
        notes = [f"{len(found)} of {count:,} {result.components}, without the others", *several]
        caption = caption_of(result, target, notes)
        return rows(found, f"share of the {value_name(result, target)}", look.said(caption), look.ax, look.width)
    if kind == "curve":
        each = {str(one.layer): one.scores_of(target)[: len(one.labels) - one.n_extras].tolist() for one in result}
        each = {f"layer {name}" if len(each) <= 8 else name: values for name, values in each.items()}
        return cumulative(
            each,
            f"{result.components} of a layer",
            look.said(caption_of(result, target)),
            look.ax,
            look.width,
        )
    if kind == "layers":
        values = [one.scores_of(target)[: len(one.labels) - one.n_extras].tolist() for one in result]
        names = [label.partition(".")[2] or label for label in result.by_layer[0].labels[: max(counts)]]
        caption = caption_of(result, target, ["without rest and bias", *several])
        split = f"share of the {value_name(result, target)}"
        return grouped(values, names, result.layers, split, look.said(caption), look.ax, look.width)
    return _layer_table(result, target, look)


def _layer_table(result: Any, target: int, look: Look) -> Any:
    """Draw layers by components; `rest` and `bias` complete every row."""
    extras = [name for name in (REST, BIAS) if any(name in one.labels[-2:] for one in result)]
    values = [
        [
            *one.scores_of(target)[: len(one.labels) - one.n_extras].tolist(),
            *(one.score(name, target) if name in one.labels[-2:] else 0.0 for name in extras),
        ]
        for one in result
    ]
    count = len(values[0]) - len(extras)
    numbered = result.components in ("heads", "neurons")
    labels = [str(k) if numbered else label.partition(".")[2] or label for k, label in enumerate(result.labels[:count])]
    axis = result.components[:-1] if numbered else result.components
    made = Table(values, [str(layer) for layer in result.layers], [*labels, *extras], "layer", axis, len(extras))
    caption = caption_of(result, target, [f"each row sums to {_value(result, target):.4f}"])
    return heat(
        made,
        f"share of the {value_name(result, target)}",
        look.said(caption),
        look.ax,
        look.width,
        look.cmap,
        look.limit,
    )


def draw_positions(layers: Sequence[Any], target: int, look: Look) -> Any:
    """Draw tokens at the input of every layer: what each position's state is worth there; return the Axes."""
    first, look = layers[0], look.checked()
    read = first.position + 1
    extras = [BIAS] if any(one.n_extras for one in layers) else []
    values = [
        [
            *one.scores_of(target)[:read].tolist(),
            *(one.score(BIAS, target) if BIAS in one.labels[-2:] else 0.0 for _ in extras),
        ]
        for one in layers
    ]
    labels = [*token_labels(first.tokens[:read]), *extras]
    numbers = [str(one.layer) for one in layers]
    worst = max(layers, key=lambda one: one.completeness_error)
    sums = {round(_value(one, target), 4) for one in layers}
    note = f"each row sums to {sums.pop():.4f}" if len(sums) == 1 else "each row sums to the credit of the layers above"
    caption = caption_of(worst, target, [f"state at the layer's input; {note}"], about="tokens at all layers")
    made = Table(values, numbers, labels, "layer", "position", len(extras))
    return heat(
        made,
        f"share of the {value_name(first, target)}",
        look.said(caption),
        look.ax,
        look.width,
        look.cmap,
        look.limit,
    )


def draw_continuation(result: Any, kind: str | None, read: str, look: Look) -> Any:
    """Draw a :class:`depass_fast.Continuation`: tokens that follow by components, or their sum; return the Axes."""
    if read not in ("logit", "log-prob"):
        raise ValueError(f"read: {read!r} is neither 'logit' nor 'log-prob'.")
    layered = hasattr(result.shares, "by_layer")
    kinds = ["sum"] if layered else ["heat", "sum"]
    if chosen(kind, kinds[0], kinds, "this continuation") == "sum":
        return result.sum.plot(**look._asdict())
    shares, look = result.shares, look.checked()
    first = 0 if read == "logit" else len(result)
    table, is_tokens = shares.scores[first : first + len(result)].tolist(), shares.components == "tokens"
    n, labels = len(result.tokens), shares.labels
    if is_tokens:
        labels = [*token_labels(result.tokens), *labels[n:]]
        for step, row in enumerate(table):  # a token has no share in what comes before it
            row[result.prompt_length + step : n] = [math.nan] * (n - result.prompt_length - step)
        table, labels = [[*row[: n - 1], *row[n:]] for row in table], [*labels[: n - 1], *labels[n:]]
    values, labels, extras = leading_columns(table, labels, shares.n_extras, None if is_tokens else 2 * look.top)
    what = "logit" if read == "logit" else "log P + entropy"
    total = math.fsum(result.log_probs.tolist())
    text = text_of_tokens(result.tokens[result.prompt_length :]).strip()
    caption = caption_of(
        shares,
        0,
        [f"each row sums to its {what}; log P of all {round(total, 3) + 0.0:.3f}"],
        f"{result.origin}: {text}",
    )
    names = token_labels(result.tokens)[result.prompt_length :]
    made = Table(values, names, labels, f"{result.origin} token", shares.components, extras)
    return heat(made, f"share of the {what}", look.said(caption), look.ax, look.width, look.cmap, look.limit)


def caption_of(
    result: Result, target: int, sums: Sequence[str] = (), title: str | None = None, about: str | None = None
) -> Caption:
    """Return the words above a result's picture: what is read, the sums, how it came about, and its warnings."""
    rule = f"{result.allocation}, T = {result.temperature:g}" if result.allocation == "softmax" else result.allocation
    what = about or f"{result.components} at {result.layer_text()}"
    method = "exact" if result.is_exact else result.method
    how = f"{what} · {method} · {rule} · attention frozen · completeness error {result.completeness_error:.1e}"
    said = [] if result.is_exact else [f"APPROXIMATE scores, of first order ({result.estimate or 'no estimate'})"]
    return Caption(
        headline(result, target) if title is None else title,
        [*(["; ".join(sums)] if sums else []), how],
        [*said, *(f"WARNING: {text}" for text in result.warnings or [])],
    )


def _at(result: Result) -> str:
    return f"at position {result.position} (after {shown_tokens(result.tokens)[result.position]!r})"


def _value(result: Result, target: int) -> float:
    return result.target_logits.reshape(-1)[target].item()


def _summed(what: str, values: Sequence[float], value: float) -> str:
    return f"{what} sum to {math.fsum(values):.4f}, the model says {value:.4f}"


def bars_of(found: Sequence[Any], tokens: Sequence[str]) -> list[Bar]:
    """Return rows of a table as bars; their labels may be those of the ``tokens`` of the prompt."""
    ranked, grey = ([row.score for row in found if row.ranked is which] for which in (True, False))
    if max(map(abs, grey), default=0.0) > 10 * max(map(abs, ranked), default=0.0):  # digits that each of them needs
        numbers = [*format_scores(ranked), *format_scores(grey)]
    else:
        numbers = format_scores([*ranked, *grey])  # the grey ones follow
    labels = shown_labels([row.label for row in found], tokens)
    return [
        Bar(label, row.score, number, row.ranked) for label, row, number in zip(labels, found, numbers, strict=True)
    ]
