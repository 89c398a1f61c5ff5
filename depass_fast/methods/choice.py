"""Which way scores are computed: `exact` or `adjoint`, and what belongs to the latter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..adapters import Adapter
from ..allocation import Allocation
from ..components.base import ComponentKind
from ..inputs.prompts import as_index

MOST_EXACT = 4096  # components of several layers together that are still propagated one by one by default
DEFAULT_REFINE, DEFAULT_SAMPLE = 64, 64
RULES = ("softmax", "taylor")
KINDS = ("neurons", "features", "custom")


@dataclass(frozen=True)
class Method:
    """``name`` "exact" or "adjoint"; the rest is of the latter: how many components are ``refine``-d and ``sample``-d.

    ``within`` "all" refines the largest of all layers, "layer" as many of each.
    """

    name: Literal["exact", "adjoint"]
    refine: int = 0
    within: Literal["all", "layer"] = "all"
    sample: int = 0
    seed: int = 0


def choose_method(
    kind: ComponentKind,
    adapter: Adapter,
    allocation: Allocation,
    method: str | None,
    refine: int | None,
    within: str,
    sample: int | None,
    seed: int,
    streams: bool = False,
    verifies: bool = False,
) -> Method:
    """Check what was asked for. None: exact for one layer, and for several with up to MOST_EXACT components in all.

    Raises:
        ValueError: an unknown method, a kind or a rule that the adjoint sweep is not for, a number out of range.
        TypeError: a number that is none.
    """
    if method not in (None, "exact", "adjoint"):
        raise ValueError(f"method: {method!r} is not one of None, 'exact', 'adjoint'.")
    if within not in ("all", "layer"):
        raise ValueError(f"refine_within: {within!r} is not one of 'all', 'layer'.")
    numbers = {"refine": refine, "sample": sample, "seed": seed}
    for name, value in numbers.items():
        if value is not None and as_index(value, name) < 0:
            raise ValueError(f"{name}: {value} is out of range; it must be at least 0.")
    able = kind.kind in KINDS and allocation.rule in RULES
    if method is None:
        layers = kind.each(adapter)
        many = able and len(layers) > 1 and sum(k.count(adapter) for k in layers) > MOST_EXACT
        asked = refine is not None or sample is not None  # what only the sweep has a use for
        method = "adjoint" if asked or many else "exact"
    if method == "exact":
        for name in ("refine", "sample"):
            if numbers[name] is not None:
                raise ValueError(f"{name}: it belongs to method='adjoint'; exact scores have nothing to be refined.")
        return Method("exact")
    if streams:
        raise ValueError("stream: method='adjoint' holds no state that could be streamed; leave one of the two out.")
    if verifies:
        raise ValueError(
            "verify: method='adjoint' carries no states that the reference could recompute, its sample says how far it "
            "is off; take method='exact', or verify=False."
        )
    if kind.kind not in KINDS:
        raise ValueError(
            f"method: 'adjoint' is for many fine-grained components ({', '.join(KINDS)}); {kind.kind} are few, for "
            "which 'exact' is cheap."
        )
    if allocation.rule not in RULES:
        raise ValueError(
            f"method: 'adjoint' needs a rule with a derivative and a partition function ({', '.join(RULES)}); "
            f"with {allocation.name!r} take method='exact'."
        )
    return Method(
        "adjoint",
        DEFAULT_REFINE if refine is None else int(refine),
        within,
        DEFAULT_SAMPLE if sample is None else int(sample),
        int(seed),
    )
