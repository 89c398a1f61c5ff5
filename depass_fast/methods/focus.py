"""A few components examined closely: carried alone, exactly, given the statistics of all (DESIGN.md section 2).

Components meet only in the allocation's statistics, for the softmax in log Z. One run over all components leaves these
behind, a table per layer (:class:`Partition`); then any component can be carried by itself, and its states at every
layer cost no more than they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..backends import StreamBackend
from ..backends.statistics import Statistics
from ..components.chosen import block_of, constant_of, empty_part, fill_part, fill_products, fill_tokens
from ..components.model import Tokens
from ..components.products import BoundProducts
from ..components.start import entering, initial_state
from ..labels import REST
from ..propagation.loop import propagate
from ..readout.completeness import warn_if_states_miss
from ..request import Request, fit, start, traced, with_trace
from ..runtime.brief import brief, brief_repr
from ..runtime.memory import readable
from ..runtime.numbers import as_index
from ..runtime.progress import progress_bar
from ..runtime.terminal import encodable
from ..runtime.transfer import to_device
from ..state.layout import Components
from ..state.state import ComponentState


@dataclass(frozen=True, eq=False)
class Partition:
    """The statistics of all components of one prompt, at every layer from where they start to ``end``.

    For the softmax that is log Z: per position and neuron the largest g/T, and the sum of exp(g/T) relative to it. For
    a linear rule there are none, and nothing is carried.
    ``completeness_error`` is the largest of the run that made it.
    """

    components: Components
    statistics: dict[tuple[int, int], Statistics]
    end: int
    completeness_error: float
    made_of: tuple

    def __repr__(self) -> str:
        return encodable(
            f"Partition(components {brief(self.labels)}, up to the input of layer {self.end}, {readable(self.nbytes)}, "
            f"completeness error {self.completeness_error:.1e})"
        )

    @property
    def labels(self) -> list[str]:
        """The labels of all components, in the order of :meth:`ComponentState.dense`."""
        return self.components.labels

    @property
    def nbytes(self) -> int:
        """The bytes that the statistics hold."""
        return sum(s.nbytes for s in self.statistics.values())


@dataclass(frozen=True, eq=False)
class Focus:
    """The chosen components at every layer.

    ``states[i]`` is (N, k, D), in the order of ``labels``, entering layer ``layers[i]``. The first one is where they
    start: before that layer, or between its attention and its MLP (`site`); the number of layers is after the last.
    """

    labels: list[str]
    states: list[Tensor]
    layers: list[int]
    site: str
    partition: Partition

    __repr__ = brief_repr

    def entering(self, layer: int) -> Tensor:
        """The states (N, k, D) that enter a layer."""
        if layer not in self.layers:
            raise ValueError(f"layer: {layer} is out of range; held are {self.layers[0]} to {self.layers[-1]}.")
        return self.states[self.layers.index(layer)]


def partition(request: Request) -> Partition:
    """Carry all components once and keep their statistics, and no states."""
    _check(request)
    return _partition(_ready(request))


def focus(request: Request, which: Sequence[int | str] | int | str, known: Partition | None = None) -> Focus:
    """Carry the components ``which``, labels or indices, by themselves: from what is ``known`` of all, or after that.

    Raises:
        ValueError: no such component; ``known`` was made of something else.
    """
    _check(request)
    if not isinstance(which, (str, int)) and not len(which):
        raise ValueError("which: empty; give labels or indices of components.")
    if known is not None and not isinstance(known, Partition):
        raise TypeError(f"partition: expected dp.partition(...), got {type(known).__name__}.")
    request = _ready(request) if known is None else with_trace(request)
    if known is None:
        known = _partition(request)
    elif not _is_of(known, request) or known.end < request.end:
        raise ValueError(
            "partition: it was made of other components, of another prompt or with other options, or does not reach "
            f"layer {request.end}; make it with dp.partition(prompt, components, ...) and the same arguments."
        )
    chosen = _indices(which, known.labels)
    n_extras, n_names = len(known.components.extras), len(known.components.names)
    rows = np.array([i - n_names if i >= n_names else i + n_extras for i in chosen])
    members = np.unique(rows)
    state = _chosen_state(request, known.components.only(members))
    order = to_device(np.searchsorted(members, rows), state.device)
    run = replace(request.run, backend=_streaming(request, known=known.statistics))
    states, layers, site = [state.block(0)[:, order]], [state.layer], state.site
    with progress_bar("layers", request.end - state.layer, run.progress) as bar:  # in place of one for every layer
        for layer in range(state.layer, request.end):
            state, _ = propagate(request.adapter, request.require_trace(), state, layer + 1, run)
            states.append(state.block(0)[:, order])
            layers.append(state.layer)
            if bar is not None:
                bar.finish()
    return Focus([known.labels[i] for i in chosen], states, layers, site, known)


def _check(request: Request) -> None:
    """Refuse what cannot be carried alone."""
    request.components.single()
    if len(request.prompts) != 1:
        raise ValueError(f"prompt: one at a time can be looked at closely, got {len(request.prompts)}.")
    if callable(request.run.allocation.rule):
        raise ValueError(
            f"allocation: {request.run.allocation.name} needs all components at once; take a rule by name."
        )
    if request.run.verifier is not None:
        raise ValueError(
            "verify: focus and partition share out by what is known of all components, where the reference operations "
            "have them all; take verify=False."
        )
    if not request.run.backend.jagged:
        raise ValueError(
            f"backend: the {request.run.backend.name} backend carries all components at once; take backend='torch'."
        )


def _ready(request: Request) -> Request:
    """Return the request, traced, with a workspace for a state that streams, whatever was asked for."""
    request = replace(request, settings=replace(request.settings, stream=True))
    return traced(fit(replace(request, run=replace(request.run, backend=_streaming(request)))))


def _partition(request: Request) -> Partition:
    """Carry all components of a request that is ready."""
    backend = _streaming(request, keep=True)
    run, trace, state = replace(request.run, backend=backend), request.require_trace(), start(request)
    components = state.layout.components[0]
    if run.allocation.linear_rule is not None:  # components do not meet: there is nothing to know of the others
        return Partition(components, {}, request.end, 0.0, _made_of(request))
    _, errors = propagate(request.adapter, trace, state, request.end, run)
    worst = float(torch.stack(errors).max())
    warn_if_states_miss(request.adapter, request.run, errors)
    return Partition(components, backend.kept, request.end, worst, _made_of(request))


def _streaming(
    request: Request,
    *,
    keep: bool = False,
    known: dict[tuple[int, int], Statistics] | None = None,
) -> StreamBackend:
    """Return a streaming backend with the dtype and the workspace of the request's own."""
    run, device = request.run, request.adapter.device
    compute, workspace = run.backend.compute_dtype, run.workspace(device)
    return StreamBackend(device, compute, workspace, keep=keep, known=known)


def _made_of(request: Request) -> tuple:
    """Return what has to be the same for a partition to hold."""
    kind, rule, source = request.components, request.run.allocation, request.require_trace().source
    ids, excluded = tuple(request.prompts[0].tolist()), tuple(sorted(request.excluded[0]))
    what = (kind.kind, request.layer, kind.site, kind.identity(), request.has_bias)
    name = rule.rule if request.run.value_rule is None else f"{rule.rule}, activations of values shared"
    return (*what, ids, excluded, name, rule.temperature, source)


def _is_of(known: Partition, request: Request) -> bool:
    """Return True if a partition was made of what is asked for. ValueError: it is another model's."""
    try:
        known.made_of[-1].check(request.adapter.model)  # one that was read from a file knows its model from now on
    except ValueError as error:
        raise ValueError(
            "partition: it was made by another model, or by this one with other weights; make it with dp.partition"
            f"(prompt, components, ...). Its trace says: {error}"
        ) from error
    return known.made_of == _made_of(request)


def _indices(which: Sequence[int | str] | int | str, labels: list[str]) -> list[int]:
    """Return the places of components among the labels."""
    items: Sequence[int | str] = [which] if isinstance(which, (str, int)) else which
    places, found = {label: i for i, label in enumerate(labels)}, []
    for item in items:
        if isinstance(item, str) and item not in places:
            raise ValueError(f"which: no component {item!r}; labels run from {labels[0]!r} to {labels[-1]!r}.")
        index = places[item] if isinstance(item, str) else as_index(item, "which")
        if not -len(labels) <= index < len(labels):
            raise ValueError(f"which: component {index} is out of range; there are {len(labels)}.")
        found.append(index % len(labels))
    return found


def _chosen_state(request: Request, chosen: Components) -> ComponentState:
    """Return some of the components where they start; tokens and neurons without making the others."""
    kind, adapter, trace, dtype = request.components, request.adapter, request.require_trace(), request.run.state_dtype
    state, x = empty_part(kind, adapter, trace, [chosen], dtype), entering(kind, adapter, trace)
    bound = kind.bound(adapter, trace, 0) if request.bound is None else request.bound[0]
    if isinstance(kind, Tokens):
        fill_tokens(state, x, trace)
    elif isinstance(bound, BoundProducts) and not kind.may_be_complete:
        fill_products(state, 0, bound)
        if REST in chosen.extras:
            block_of(state, 0)[:, chosen.extras.index(REST)] = _rest_of(bound, x, dtype)
    else:
        more = {"has_bias": request.has_bias, "dtype": dtype, "excluded": request.excluded, "bound": (bound,)}
        fill_part(state, initial_state(kind, adapter, trace, **more))
    return state


def _rest_of(bound: BoundProducts, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the components that are ``bound`` leave of ``x`` (N, D), none of them held longer than a position."""
    wide, (numbers, vectors) = (
        torch.promote_types(dtype, torch.float32),
        (bound.products.coefficients, bound.products.vectors),
    )
    assert numbers is not None, "neurons have numbers at every position"
    vectors, rest = vectors.to(wide), x.to(wide) - constant_of(bound, wide)
    for n, of_all in enumerate(numbers.to(wide)):  # summed up as where all are made, so that it is rounded alike
        rest[n] -= (of_all[:, None] * vectors).to(dtype).sum(0, dtype=wide)
    return rest.to(dtype)
