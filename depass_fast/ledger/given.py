"""The rule and the options of a ledger, checked before any work, and the arguments that it has no use for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from ..adapters import Adapter
from ..allocation import RULES
from ..components.base import ComponentKind, SeveralLayers
from ..components.model import Heads, Modules, Neurons, Tokens
from ..linear_rules import LINEAR_RULES
from ..options import LinearRuleName, Options
from ..runtime.numbers import as_index

DEFAULT_RULE: LinearRuleName = "shapley"
_NOTHING_TO_REFINE = (
    "a ledger's scores are exact, by one forward and one backward pass; there is no method to choose, and nothing to "
    "refine or to sample. Leave it out."
)
_ALL_LAYERS = "a ledger is of all layers and kinds; leave it out, and ask the ledger: heads(3), neurons(), top(20)."
_TEXT = "a ledger has targets; the tokens of a given text are attribute(..., continuation=...)."
_NO_ARGUMENTS = {
    "allocation": "a ledger takes it as rule=.",
    **dict.fromkeys(("method", "refine", "within", "sample", "seed"), _NOTHING_TO_REFINE),
    **dict.fromkeys(("components", "layer", "layers", "kinds"), _ALL_LAYERS),
    "end": "a ledger reads behind the last layer; attribute(..., end=...) reads at another one.",
    **dict.fromkeys(("continuation", "reduce"), _TEXT),
}
OWN_KINDS: dict[str, ComponentKind] = {  # of the model itself, of all layers
    "tokens": Tokens(),
    "modules": Modules(layers="all"),
    "heads": Heads(layers="all"),
    "neurons": Neurons(layers="all"),
}


def kinds_there(adapter: Adapter) -> tuple[str, ...]:
    """Return those of the model's own kinds that any of its layers has."""
    has = {"heads": adapter.has_attention, "neurons": adapter.has_mlp}
    return tuple(kind for kind in OWN_KINDS if kind not in has or any(map(has[kind], range(adapter.n_layers))))


def check_kinds(kinds: Sequence[str], adapter: Adapter) -> None:
    """Raise ValueError unless ``kinds`` are a list of the model's own kinds that it has."""
    if isinstance(kinds, str) or (unknown := [kind for kind in kinds if kind not in OWN_KINDS]):
        given = kinds if isinstance(kinds, str) else unknown[0]
        raise ValueError(f"kinds: expected a list of {', '.join(map(repr, OWN_KINDS))}, got {given!r}.")
    if missing := [kind for kind in kinds if kind not in kinds_there(adapter)]:
        found = ", ".join(map(repr, kinds_there(adapter)))
        raise ValueError(f"kinds: no layer of this model has {missing[0]}; it has {found}.")


def refuse_arguments(names: Iterable[str]) -> None:
    """Raise TypeError for an argument of other calls that a ledger has no use for; the message says what to do."""
    for name in names:
        if name in _NO_ARGUMENTS:
            raise TypeError(f"{name}: {_NO_ARGUMENTS[name]}")


def check_options(settings: Options) -> None:
    """Raise ValueError for options about states that are carried."""
    for name, given in (("stream", settings.stream is True), ("verify", settings.verify)):
        if given:
            raise ValueError(f"{name}: a ledger carries no states; leave it out. attribute(...) has method='exact'.")


def rule_of(rule: Any, settings: Options) -> LinearRuleName:
    """Return the linear rule of a ledger; None: the engine's own allocation where that is linear, else "shapley".

    Raises:
        ValueError: an unknown rule, or one that is not linear.
    """
    if rule is not None:
        return check_rule(rule, "rule")
    own = settings.allocation
    return cast(LinearRuleName, own) if own in LINEAR_RULES else DEFAULT_RULE


def check_rule(rule: Any, argument: str) -> LinearRuleName:
    """Return a linear rule by its name.

    Raises:
        ValueError: an unknown rule, or one that is not linear; the message says what to do.
    """
    known, linear = isinstance(rule, str), ", ".join(map(repr, LINEAR_RULES))
    if known and rule in LINEAR_RULES:
        return cast(LinearRuleName, rule)
    if not callable(rule) and not (known and rule in RULES):
        raise ValueError(f"{argument}: unknown rule {rule!r}; the linear rules, which have a ledger, are {linear}.")
    advice = (
        "for the neurons of all layers under it take method='adjoint' of attribute."
        if rule == "softmax"
        else "under it attribute one layer at a time, with allocation= of attribute."
    )
    name = getattr(rule, "__name__", repr(rule)) if callable(rule) else repr(rule)
    raise ValueError(f"{argument}: {name} is not linear, and has no ledger ({linear} have one); {advice}")


def numbered(given: Any, name: str, count: int) -> int:
    """Return which of ``count`` is meant, counted from 0. Raises IndexError for none, TypeError for no integer."""
    number = as_index(given, name)
    if not -count <= number < count:
        raise IndexError(f"{name}: {number} is out of range; this ledger holds {count}.")
    return number % count


def place(layer: int | str | None, layers: SeveralLayers | None) -> dict[str, Any]:
    """Return the arguments of a kind for one layer or several, by default for all. Raises ValueError for both."""
    refuse_both(layer, layers)
    return {"layers": "all" if layers is None else layers} if layer is None else {"layer": layer}


def refuse_both(layer: int | str | None, layers: SeveralLayers | None) -> None:
    """Raise ValueError if one layer is named beside several."""
    if layer is not None and layers is not None:
        raise ValueError(f"layer: {layer!r} beside layers={layers!r}; give one of the two.")
