"""The method of a request: exact propagation, the adjoint sweep, or the way back of a linear rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .adapters import Adapter
from .agreement import agreed
from .allocation import Allocation
from .components.base import ComponentKind
from .components.features import Features
from .components.model import Neurons, Tokens
from .linear_rules import LINEAR_RULES
from .options import LINEAR, Adjoint, Options
from .planning.shapes import named_components
from .request import Request, gradients_of

MOST_EXACT = 4096  # components of several layers together that are propagated exactly by default
ADJOINT_KINDS = ("neurons", "features", "custom")


def with_method(request: Request, method: str | Adjoint | None, n_targets: int = 1) -> Request:
    """Return the request with the method that it is computed by, see :func:`choose_method`, once all ranks agree.

    ``n_targets`` is the number of targets of every read where the request does not hold them yet.
    """
    gradients = [n_targets * count for count in gradients_of(request)]
    given = (request.components, request.adapter, request.settings, request.carried, gradients)
    return agreed(replace(request, method=choose_method(method, *given)))


def choose_method(
    method: str | Adjoint | None,
    kind: ComponentKind,
    adapter: Adapter,
    settings: Options,
    lengths: Sequence[int],
    gradients: Sequence[int],
) -> Adjoint | None:
    """Return the sweep that ``method`` stands for, or None for exact propagation.

    ``method`` None is exact for one layer, and for several layers with up to MOST_EXACT components in all. Under a
    linear rule it is the way back, which is exact, wherever that is cheaper: :data:`depass_fast.options.LINEAR`.
    ``lengths`` are the positions that are carried of every prompt, ``gradients`` the targets of all its reads.

    Raises:
        ValueError: an unknown method; a kind, a rule or an option that the adjoint sweep is not for.
    """
    if not isinstance(method, Adjoint) and method not in (None, "exact", "adjoint"):
        raise ValueError(f"method: {method!r} is not one of None, 'exact', 'adjoint', Adjoint(...).")
    allocation = Allocation(settings.allocation, settings.temperature)
    if method == "exact":
        return None
    if allocation.linear_rule is not None:
        found = _linear(method, allocation, settings)
        return None if method is None and not _is_cheaper(kind, adapter, lengths, gradients) else found
    fits = adapter.mixes_plainly and not adapter.weighs_inputs
    if method is None and not (_is_large(kind, adapter) and allocation.rule == "softmax" and fits):
        return None
    linear = f" Take method='exact', or a linear rule ({', '.join(map(repr, LINEAR_RULES))}), exact for all at once."
    adapter.check_uniform("method: 'adjoint' under 'softmax'", linear, routed_heads=True)
    if adapter.weighs_inputs:
        raise ValueError(
            "method: 'adjoint' under 'softmax' is not for models whose router weighs what experts read, and not what "
            f"they write.{linear}"
        )
    _refuse_states(settings)
    if kind.kind not in ADJOINT_KINDS:
        raise ValueError(
            f"method: 'adjoint' is for many fine-grained components ({', '.join(ADJOINT_KINDS)}); {kind.kind} are few, "
            "for which 'exact' is cheap."
        )
    if allocation.rule != "softmax":
        raise ValueError(
            "method: 'adjoint' needs a rule with a derivative and a partition function, 'softmax', or a linear one "
            f"({', '.join(map(repr, LINEAR_RULES))}); with {allocation.name!r} take method='exact'."
        )
    return method if isinstance(method, Adjoint) else Adjoint()


def _is_cheaper(kind: ComponentKind, adapter: Adapter, lengths: Sequence[int], gradients: Sequence[int]) -> bool:
    """True unless gradients pass more rows than components would, layer by layer, in any of the prompts."""
    kinds, n = kind.each(adapter), adapter.n_layers
    passed = [n - one.entry(adapter).layer for one in kinds]
    for length, count in zip(lengths, gradients, strict=True):
        named = [named_components(one, adapter, length)[0] for one in kinds]
        if isinstance(kind, Tokens):  # of which there is one more at each position
            named = [(length + 1) / 2]
        if count * max(passed) > sum(m * layers for m, layers in zip(named, passed, strict=True)):
            return False
    return True


def _linear(method: str | Adjoint | None, allocation: Allocation, settings: Options) -> Adjoint | None:
    """Return the method under a linear rule: the way back, or exact propagation where an option needs states."""
    if isinstance(method, Adjoint) and (method.refine or method.sample):
        raise ValueError(
            f"method: under the linear rule {allocation.name!r} the adjoint is exact, with nothing to refine and no "
            f"error to sample (refine={method.refine}, sample={method.sample}); take method='adjoint'."
        )
    if method is None and (settings.stream is True or settings.verify):
        return None
    _refuse_states(settings)
    return LINEAR


def _refuse_states(settings: Options) -> None:
    """Refuse options about states that are carried, which the adjoint does not do."""
    if settings.stream is True:
        raise ValueError("stream: method='adjoint' holds no state that could be streamed; leave one of the two out.")
    if settings.verify:
        raise ValueError(
            "verify: method='adjoint' carries no states that the reference could recompute, its sample says how far it "
            "is off; take method='exact', or verify=False."
        )


def _is_large(kind: ComponentKind, adapter: Adapter) -> bool:
    """True if these are so many neurons or features of several layers that exact propagation would take long.

    All features of a dictionary count: the method of a call does not depend on the prompt.
    """
    kinds = kind.each(adapter)
    counts = [one.count(adapter) for one in kinds if isinstance(one, Neurons | Features)]
    return len(counts) > 1 and sum(counts) > MOST_EXACT
