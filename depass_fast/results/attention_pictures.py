"""Attention's results as pictures: why a head looks where it looks, and what a target owes to that."""

from __future__ import annotations

import math
from typing import Any

from ..labels import BIAS, REST, shown_tokens
from ..plots.bars import Bar, columns, rows
from ..plots.frame import Caption
from ..plots.heat import Table, heat
from ..plots.places import leading_columns, token_labels
from .interface import Row
from .pictures import Look, bars_of, chosen
from .ranking import leading
from .render import rows_of_pairs

_PLACE = "position"  # ALiBi's component


def draw_explanation(why: Any, kind: str | None, key: int | None, head: int | None, look: Look) -> Any:
    """Draw an :class:`depass_fast.AttentionExplanation` of one head; return the Axes."""
    kinds = ["keys", "leading", "probabilities"] if len(why.keys) > 2 else ["leading"]
    kind, look = chosen(kind, "leading" if key is not None else kinds[0], kinds, "this explanation"), look.checked()
    number = why.heads.index(head) if head in why.heads else why._head(head)
    part = (lambda x: x) if why.one_head else (lambda x: x[number])
    p = part(why.probabilities).tolist()
    place = f"L{why.layer}H{why.heads[number]} at position {why.query} ({shown_tokens(why.tokens)[why.query]!r})"
    labels = token_labels(why.tokens)
    keys = [labels[k] for k in why.keys]
    if kind == "probabilities":
        sink = "" if why.sink is None else f", looking nowhere {float(part(why.sink)):.4f}"
        caption = _caption(why, f"{place}: where it looks", f"bars sum to {math.fsum(p):.4f}{sink}")
        return columns(
            [Bar(*one) for one in zip(keys, p, strict=True)], "probability", look.said(caption), look.ax, look.width
        )
    if kind == "leading":
        return _leading(why, place, key, number, look)
    shares = (part(why.shares) - part(why.mean_shares)).tolist()  # what all keys share cancels in the softmax
    extras = _extras(why.labels)
    count = len(why.labels) - extras
    is_tokens = why.components == "tokens"
    labels = [*labels[:count], *why.labels[count:]] if is_tokens else why.labels
    values, labels, extras = leading_columns(shares, labels, extras, None if is_tokens else 2 * look.top)
    names = [f"{name} {chance:.0%}" for name, chance in zip(keys, p, strict=True)]
    caption = _caption(why, f"{place}: why it looks there", "each row sums to its log P + the entropy of P")
    made = Table(values, names, labels, "key", why.components, extras)
    return heat(made, "share of log P", look.said(caption), look.ax, look.width, look.cmap, look.limit)


def _leading(why: Any, place: str, key: int | None, number: int, look: Look) -> Any:
    """Draw the leading components of one key's logit, or of the difference of the two that were asked for."""
    part = (lambda x: x) if why.one_head else (lambda x: x[number])
    logits, tokens = part(why.scores).tolist(), shown_tokens(why.tokens)
    if key is None and why.asked == "pair":
        a, b = why.keys
        shares, value = why.difference(head=why.heads[number]), logits[0] - logits[1]
        title = f"{place}: {tokens[a]!r}@{a} and not {tokens[b]!r}@{b}, log ratio {value:.4f}"
    else:
        at = int(part(why.probabilities).argmax()) if key is None else why._key(key)
        shares, value, k = part(why.shares)[at], logits[at], why.keys[at]
        title = f"{place}: {tokens[k]!r}@{k}, logit {value:.4f}, P {part(why.probabilities)[at]:.3f}"
    found = _rows(why, shares, look.top)
    note = f"bars sum to {math.fsum(bar.value for bar in found):.4f}, the head's own is {value:.4f}"
    return rows(found, "share of the attention logit", look.said(_caption(why, title, note)), look.ax, look.width)


def draw_credit(credit: Any, kind: str | None, target: int, look: Look) -> Any:
    """Draw an :class:`depass_fast.AttentionCredit`: layers by heads, or the leading components; return the Axes."""
    kind, look = chosen(kind, "heads", ("heads", "leading"), "a credit of attention"), look.checked()
    changes = credit._of(credit.changes, target)
    total = math.fsum(changes.flatten().tolist())
    name = credit.target_names[target]
    title = f"{name} at position {credit.position}: {total:+.4f} owed to where heads look"
    if kind == "heads":
        labels = [str(head) for head in range(changes.shape[1])]
        made = Table(changes.tolist(), [str(layer) for layer in credit.layers], labels, "layer", "head")
        caption = _caption(credit, title, f"cells sum to {total:.4f}", credit.rule)
        return heat(made, "change by looking", look.said(caption), look.ax, look.width, look.cmap, look.limit)
    shares = credit.total(target)
    found = _rows(credit, shares, look.top)
    note = f"bars sum to {math.fsum(bar.value for bar in found):.4f}, the heads' changes to {total:.4f}"
    return rows(
        found,
        "credit of attention",
        look.said(_caption(credit, title, note, credit.rule)),
        look.ax,
        look.width,
    )


def _rows(result: Any, shares: Any, top: int) -> list[Bar]:
    """Return the leading components, the others in one bar, and the extras as they are."""
    labels = result.labels
    count = len(labels) - _extras(labels)
    shown = leading(labels[:count], shares[:count], top, "magnitude")
    values = shares.tolist()
    more: list[tuple[str, float]] = list(zip(labels[count:], values[count:], strict=True))
    if len(shown) < count:
        others = math.fsum(values[:count]) - math.fsum(value for _, value in shown)
        more = [(f"{count - len(shown)} others", others), *more]
    found = [*rows_of_pairs(shown), *(Row(label, value, ranked=False) for label, value in more)]
    return bars_of(found, result.tokens)


def _extras(labels: list[str]) -> int:
    """Return the number of last labels that are no components."""
    return sum(label in (REST, BIAS, _PLACE) for label in labels[-3:])


def _caption(result: Any, title: str, note: str, rule: str | None = None) -> Caption:
    start = result.start if rule is None else result.layer
    how = (
        f"{result.components} from layer {start} · {rule or result.allocation} · "
        f"completeness error {result.completeness_error:.1e}"
    )
    return Caption(title, [note, how], [f"WARNING: {text}" for text in result.warnings or []])
