"""Attention's results as pages: a sheet for each head that is explained, and for each target of a credit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..labels import BIAS, REST, shown_labels, shown_tokens
from ..report.sheet import Sheet, components_view, tokens_view
from ..report.units import Group, group_of, leading, unit_of
from .html import FEW_ROWS, MOST_ROWS, AsPage

KEYS, COMPONENTS, HEADS = 64, 48, 64  # that a sheet holds in full, at most
_ROOM = 120_000  # numbers of a page
_PLACE = "position"  # ALiBi's component
SHARP = 0.95  # P of a head's first key; beyond it log P + entropy is near zero, and says nothing
_FROZEN = "Norms, rotary embedding and caps are frozen: shares are parts of the logit, and no counterfactual."


class ExplanationPage(AsPage):
    """Gives :class:`depass_fast.AttentionExplanation` its page: a sheet for each head."""

    def page_sheets(self) -> list[Sheet]:
        """Return the sheets of the page, the sharpest head first."""
        why: Any = self
        order = np.argsort(why.entropy.reshape(-1).cpu().numpy(), kind="stable").tolist()
        return [_explained(why, number, len(order)) for number in order]

    def few_sheets(self) -> tuple[list[Sheet], int]:
        """Return the sheet of the sharpest head, and how many others there are."""
        why: Any = self
        return [_explained(why, int(why.entropy.reshape(-1).argmin()), 1)], len(why.heads) - 1


class CreditPage(AsPage):
    """Gives :class:`depass_fast.AttentionCredit` its page: a sheet for each target."""

    def page_sheets(self) -> list[Sheet]:
        """Return the sheets of the page."""
        credit: Any = self
        return [_credited(credit, target) for target in range(len(credit.target_names))]

    def few_sheets(self) -> tuple[list[Sheet], int]:
        """Return the sheet of the first target, and how many others there are."""
        credit: Any = self
        return [_credited(credit, 0)], len(credit.target_names) - 1


def _sheet(result: Any, name: str, headline: str, target: str, what: str, value: float, unit: float) -> Sheet:
    """Return a sheet without views."""
    return Sheet(
        name=name,
        headline=headline,
        target=target,
        what=what,
        value=value,
        unit=unit,
        error=float(result.completeness_error),
        exact=True,
        about="",
        tokens=result.tokens,
        position=-1,
        warnings=list(result.warnings or []),
        notes=[],
        made_with=None if result.provenance is None else result.provenance.told(),
    )


def _explained(why: Any, number: int, count: int) -> Sheet:
    """Return the sheet of one head, of ``count`` that share the room of a page."""
    p, scores, shares, mean = (
        (x if why.one_head else x[number]).double().cpu().numpy()
        for x in (why.probabilities, why.scores, why.shares, why.mean_shares)
    )
    if why.asked == "all":  # what all keys have in common cancels in the softmax
        shares = shares - mean
        values, what = shares.sum(-1), "log P + entropy"
        exact = np.log(np.maximum(p, np.finfo(p.dtype).tiny)) + float(why.entropy.reshape(-1)[number])
    else:
        values, exact, what = shares.sum(-1), scores, "logit"
    order = np.argsort(-p, kind="stable") if why.asked == "all" else np.arange(len(p))
    of_key, is_sharp = what, why.asked == "all" and len(p) > 1 and float(p.max()) > SHARP
    names = [f"{shown_tokens(why.tokens)[key]!r}@{key}" for key in why.keys]
    title = f"L{why.layer}H{why.heads[number]}"
    keys: list[tuple[str, int | None, float | None, np.ndarray, float]] = [
        (names[at], why.keys[at], float(p[at]), shares[at], float(exact[at])) for at in order.tolist()
    ]
    called = f"{title}, {p[order[0]]:.0%} on {keys[0][0]}" if why.asked == "all" else title
    if why.asked == "pair" or is_sharp:
        one, other = order[:2]
        away = f"{names[one]} and not {names[other]}"
        keys.insert(0, (away, None, None, shares[one] - shares[other], float(scores[one] - scores[other])))
        what = "log ratio"
    unit = unit_of(max(float(np.abs(shares).max()), *(abs(value) for *_, value in keys)))
    at = f"position {why.query} ({shown_tokens(why.tokens)[why.query]!r})"
    sheet = _sheet(why, called, f"{title} at {at} looks at {keys[0][0]}", f"{title} at {at}", what, keys[0][-1], unit)
    sheet.position = why.query
    sheet.about = f"{why.components} at layer {why.start} | {_how(why, why.allocation)}"
    sheet.notes = [
        "Half of each share is that of the query's components, half that of the key's: either side alone sums to the "
        "logit.",
        *(
            ["A share is that of the logit less its mean over all keys, weighted by P: it says what sets a key apart."]
            if why.asked == "all"
            else []
        ),
        *(
            [
                f"{keys[1][0]} has nearly all of P, so its log P + entropy is near zero. Its log ratio to the second "
                "key comes first."
            ]
            if is_sharp
            else []
        ),
        _FROZEN,
    ]
    chances = p.tolist()
    nowhere = None if why.sink is None else float(why.sink.reshape(-1)[number])
    sheet.views = [
        _looks(why.keys, chances, nowhere),
        _keys_view(why, keys[: max(8, min(KEYS, _ROOM // (count * (COMPONENTS + 2))))], len(values), unit, of_key),
    ]
    return sheet


def _how(result: Any, rule: str) -> str:
    return (
        f"{rule} | {result.backend} on {result.device}, {result.dtype} | completeness error "
        f"{result.completeness_error:.1e} | {result.seconds:.2f} s"
    )


def _looks(keys: Sequence[int], chances: Sequence[float], nowhere: float | None) -> dict[str, Any]:
    """Return the prompt with the probability of every key, in millionths, as a view."""
    unit, extra = 1e-6, 0.0 if nowhere is None else nowhere
    group = group_of([""] * len(chances), np.array(chances), unit, np.arange(len(chances)), rest=extra or None)
    view = tokens_view(group, list(keys))
    said = {
        "title": "Where it looks",
        "lead": "The probability of every key. Choose one to see why.",
        "word": "probability",
        "rest": "looking nowhere",
        "unit": unit,
    }
    return {**view, **said}


def _keys_view(
    why: Any,
    keys: Sequence[tuple[str, int | None, float | None, np.ndarray, float]],
    count: int,
    unit: float,
    what: str,
) -> dict[str, Any]:
    """Return the view of keys by components: for each key, the leading components of all of them, and their sum."""
    table = _Components(why, unit)
    sizes = np.max([np.abs(shares[: table.n]) for *_, shares, _ in keys], 0)
    kept = leading(sizes, COMPONENTS, 0.999)
    groups = [
        {**table.group(shares, kept).plain(), "name": name, "key": key, "p": chance, "value": value}
        for name, key, chance, shares, value in keys
    ]
    return {
        "kind": "keys",
        "id": "keys",
        "title": "Why it looks there",
        "components": why.components,
        "what": what,
        "left": count - sum(one["key"] is not None for one in groups),
        "groups": groups,
    }


def _credited(credit: Any, target: int) -> Sheet:
    """Return the sheet of one target of a credit."""
    changes = credit._of(credit.changes, target).double().cpu().numpy()  # (L, H)
    scores = credit._of(credit.scores, target).double().cpu().numpy()  # (L, H, M)
    whole = scores.sum((0, 1))
    total = float(changes.sum())
    unit = unit_of(max(float(np.abs(whole).max()), float(np.abs(changes).max()), abs(total)))
    name = credit.target_names[target]
    headline = (
        f"{name} at position {credit.position} (after {shown_tokens(credit.tokens)[credit.position]!r}): "
        f"{total:+.4f} owed to where heads look, and not evenly"
    )
    sheet = _sheet(credit, f"{name}, credit of attention", headline, name, "credit of attention", total, unit)
    sheet.position = credit.position
    sheet.about = f"{credit.components} at layer {credit.layer} | {_how(credit, credit.rule)}"
    sheet.notes = [
        "A head's credit is what it adds to the target less what it would add if it looked evenly at all that it sees.",
        f"The logit itself is {float(credit.target_logits.reshape(-1)[target]):.4f}. Heads overlap: a credit is no "
        "part of it.",
    ]
    table = _Components(credit, unit)
    if credit.components == "tokens":
        sheet.views.append(tokens_view(table.group(whole, np.arange(table.n)), list(range(table.n))))
    else:
        sheet.views.append(tokens_view(Group([], (0, 0), None, None, 0), []))
    groups, owed = [], {}
    for row, layer in enumerate(credit.layers):
        heads = [f"L{layer}H{head}" for head in range(changes.shape[1])]
        groups.append(group_of(heads, changes[row], unit, np.arange(len(heads)), layer=layer))
    order = np.argsort(-np.abs(changes).ravel(), kind="stable")[:HEADS]
    for flat in order.tolist():
        row, head = divmod(flat, changes.shape[1])
        owed[f"L{credit.layers[row]}H{head}"] = table.leading(scores[row, head], FEW_ROWS * 2).plain()
    lead = "The credit of every head. Choose one to see the components that it is owed to."
    sheet.views.append(components_view("heads", "Heads", groups, {"lead": lead, "adds": True, "owed": owed}))
    title = f"{credit.components.capitalize()} at layer {credit.layer}, all heads together"
    view = components_view(credit.components, title, [table.leading(whole, MOST_ROWS)])
    sheet.views.append({**view, "id": f"all-{credit.components}"})  # that of the heads that look is another
    return sheet


class _Components:
    """The components of a result, as they are shown: ``n`` of them, and then `rest`, `bias` and `position`."""

    def __init__(self, result: Any, unit: float) -> None:
        is_tokens = result.components == "tokens"
        self.labels = shown_labels(result.labels, result.tokens) if is_tokens else list(result.labels)
        self.n = len(self.labels) - sum(label in (REST, BIAS, _PLACE) for label in self.labels[-3:])
        self.unit = unit

    def group(self, scores: np.ndarray, kept: np.ndarray) -> Group:
        """Return scores (M,) as a group that holds the components at the places ``kept``; `position` is one."""
        extras = dict(zip(self.labels[self.n :], scores[self.n :].tolist(), strict=True))
        labels, found = self.labels[: self.n], scores[: self.n]
        if _PLACE in extras:
            labels, found, kept = [*labels, _PLACE], np.append(found, extras[_PLACE]), np.append(kept, self.n)
        return group_of(labels, found, self.unit, kept, extras.get(REST), extras.get(BIAS))

    def leading(self, scores: np.ndarray, most: int) -> Group:
        """Return scores (M,) as a group of the ``most`` leading components."""
        return self.group(scores, leading(np.abs(scores[: self.n]), most))
