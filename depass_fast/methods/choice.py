"""The choice between exact propagation and the adjoint sweep."""

from __future__ import annotations

from ..adapters import Adapter
from ..allocation import Allocation
from ..components.base import ComponentKind
from ..options import Adjoint

MOST_EXACT = 4096  # components of several layers together that are still propagated exactly by default
RULES = ("softmax", "taylor")  # which have a derivative and a partition function, or need none
KINDS = ("neurons", "features", "custom")


def choose_method(
    method: str | Adjoint | None,
    kind: ComponentKind,
    adapter: Adapter,
    allocation: Allocation,
    *,
    streams: bool = False,
    verifies: bool = False,
) -> Adjoint | None:
    """Return the sweep that ``method`` stands for, or None for exact propagation.

    ``method`` None is exact for one layer, and for several layers with up to MOST_EXACT components in all.

    Raises:
        ValueError: an unknown method; a kind, a rule or an option that the adjoint sweep is not for.
    """
    if not isinstance(method, Adjoint) and method not in (None, "exact", "adjoint"):
        raise ValueError(f"method: {method!r} is not one of None, 'exact', 'adjoint', Adjoint(...).")
    if method == "exact":
        return None
    if method is None and not (_is_large(kind, adapter) and allocation.rule in RULES):
        return None
    _check(kind, allocation, streams, verifies)
    return method if isinstance(method, Adjoint) else Adjoint()


def _is_large(kind: ComponentKind, adapter: Adapter) -> bool:
    """Whether these are so many neurons of several layers that exact propagation would take long."""
    layers = kind.each(adapter)
    return kind.kind in KINDS and len(layers) > 1 and sum(one.count(adapter) for one in layers) > MOST_EXACT


def _check(kind: ComponentKind, allocation: Allocation, streams: bool, verifies: bool) -> None:
    """Refuse what the adjoint sweep cannot do."""
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
