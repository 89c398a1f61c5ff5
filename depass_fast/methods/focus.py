"""A few components examined closely: carried alone, exactly, from what is known of all of them (DESIGN.md section 2).

Components meet only in the allocation's statistics, for the softmax in log Z. One run over all components leaves these
behind, a table per layer (:class:`Partition`); then any component can be carried by itself, and its states at every
layer cost no more than they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..backends import StreamBackend
from ..backends.statistics import Statistics
from ..components.model import Tokens
from ..components.products import BoundProducts
from ..components.start import initial_state
from ..labels import BIAS, REST
from ..request import Request, fit
from ..runtime.progress import progress_bar
from ..runtime.transfer import to_device
from ..state.layout import Components, Layout
from ..state.state import ComponentState
from ..trace.record import Trace

if TYPE_CHECKING:
    from ..engine import DePass


@dataclass(frozen=True, eq=False)
class Partition:
    """What all components of one prompt say together, at every layer from where they start to ``end``.

    For the softmax that is log Z: per position and neuron the largest g/T and the sum of exp(g/T) relative to it.
    ``completeness_error`` is the largest of the run that made it.
    """

    components: Components
    statistics: dict[tuple[int, int], Statistics]
    end: int
    completeness_error: float
    made_of: tuple

    @property
    def labels(self) -> list[str]:
        """Of all components, in the order of :meth:`ComponentState.dense`."""
        return self.components.labels

    @property
    def nbytes(self) -> int:
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

    def entering(self, layer: int) -> Tensor:
        """The states (N, k, D) that enter a layer."""
        if layer not in self.layers:
            raise ValueError(f"layer: {layer} is out of range; held are {self.layers[0]} to {self.layers[-1]}.")
        return self.states[self.layers.index(layer)]


def make_partition(dp: DePass, call: Request) -> Partition:
    """One run over all components that keeps the statistics, and no states."""
    _check(call)
    call = _fitted(dp, call)
    trace = call.trace or dp._capture(call.prompts, call.run.progress)
    backend = _streaming(dp, call, keep=True)
    call = replace(call, trace=trace, run=replace(call.run, backend=backend))
    _, state = dp.start_state(call)
    components = state.layout.components[0]
    _, errors = dp.propagate(trace, state, call.end, call.run)
    worst = float(torch.stack(errors).max())
    return Partition(components, backend.kept, call.end, worst, _made_of(call, trace))


def _fitted(dp: DePass, call: Request) -> Request:
    """Fitted as what it is, whatever was asked for: a run whose state streams."""
    call = replace(call, settings=replace(call.settings, stream=True))
    return fit(replace(call, run=replace(call.run, backend=_streaming(dp, call))), dp.adapter)


def focused(dp: DePass, call: Request, which: Sequence[int | str], partition: Partition | None) -> Focus:
    """The components ``which``, by label or by index, from ``partition`` or from one that is made now."""
    _check(call)
    if not isinstance(which, (str, int)) and not len(which):
        raise ValueError("focus: empty; give labels or indices of components.")
    if partition is None:
        call = _fitted(dp, call)
    trace = call.trace or dp._capture(call.prompts, call.run.progress)
    call = replace(call, trace=trace)
    if partition is None:
        partition = make_partition(dp, call)
    elif partition.made_of != _made_of(call, trace) or partition.end < call.end:
        raise ValueError(
            "partition: it was made of other components, of another prompt or with other options, or does not reach "
            f"layer {call.end}; make it with dp.partition(prompt, components, ...) and the same arguments."
        )
    chosen = _resolve(which, partition.labels)
    n_extras, n_names = len(partition.components.extras), len(partition.components.names)
    rows = np.array([i - n_names if i >= n_names else i + n_extras for i in chosen])
    members = np.unique(rows)
    state = _chosen_state(dp, call, trace, partition.components, members)
    order = to_device(np.searchsorted(members, rows), state.device)
    run = replace(call.run, backend=_streaming(dp, call, known=partition.statistics, members=[members]))
    states, layers, site = [state.block(0)[:, order]], [state.layer], state.site
    with progress_bar("layers", call.end - state.layer, run.progress) as shown:  # in place of one for every layer
        for layer in range(state.layer, call.end):
            state, _ = dp.propagate(trace, state, layer + 1, run)
            states.append(state.block(0)[:, order])
            layers.append(state.layer)
            if shown is not None:
                shown.finish()
    return Focus([partition.labels[i] for i in chosen], states, layers, site, partition)


def _check(call: Request) -> None:
    call.components.single()
    if len(call.prompts) != 1:
        raise ValueError(f"focus: components of one prompt at a time, got {len(call.prompts)} prompts.")
    if callable(call.run.allocation.rule):
        raise ValueError(f"focus: {call.run.allocation.name} needs all components at once; take a rule by name.")
    if call.run.verifier is not None:
        raise ValueError(
            "verify: focus and partition share out by what is known of all components, where the reference operations "
            "have them all; take verify=False."
        )
    if not call.run.backend.jagged:
        raise ValueError(
            f"focus: the {call.run.backend.name} backend carries all components at once; take backend='torch'."
        )


def _streaming(dp: DePass, call: Request, **more: Any) -> StreamBackend:
    device = dp.adapter.device
    return StreamBackend(device, call.run.backend.compute_dtype, call.run.workspace(device), **more)


def _made_of(call: Request, trace: Trace) -> tuple:
    """What has to be the same for a partition to hold."""
    kind, rule = call.components, call.run.allocation
    given = tuple(id(tensor) for tensor in kind.given())
    ids, excluded = tuple(call.prompts[0].tolist()), tuple(sorted(call.excluded[0]))
    what = (kind.kind, call.layer, kind.site, given, call.has_bias)
    return (*what, ids, excluded, rule.rule, rule.temperature, trace.source.model, trace.source.version)


def _resolve(which: Sequence[int | str], labels: list[str]) -> list[int]:
    if isinstance(which, (str, int)):
        which = [which]
    if not len(which):
        raise ValueError("focus: empty; give labels or indices of components.")
    places, found = {label: i for i, label in enumerate(labels)}, []
    for item in which:
        if isinstance(item, str) and item not in places:
            raise ValueError(f"focus: no component {item!r}; labels run from {labels[0]!r} to {labels[-1]!r}.")
        index = places[item] if isinstance(item, str) else int(item)
        if not -len(labels) <= index < len(labels):
            raise ValueError(f"focus: component {index} is out of range; there are {len(labels)}.")
        found.append(index % len(labels))
    return found


def _chosen_state(dp: DePass, call: Request, trace: Trace, whole: Components, members: np.ndarray) -> ComponentState:
    """Some of the components where they start; tokens, neurons and features without making the others."""
    extras = tuple(whole.extras[i] for i in members if i < len(whole.extras))
    named = members[members >= len(whole.extras)] - len(whole.extras)
    names = tuple(whole.names[i] for i in named)
    layout = Layout.of((Components(extras, names, whole.births[members], whole.excluded[members]),), trace.offsets)
    kind, adapter, dtype = call.components, dp.adapter, call.run.state_dtype
    bound, (entering, site) = kind.bound(adapter, trace, 0), kind.entry(adapter)
    x = trace.resid_at(entering, site).to(adapter.layer_device(call.layer))
    state = ComponentState(x.new_zeros(layout.n_rows, x.shape[1], dtype=dtype), layout, entering, site)
    if isinstance(kind, Tokens):
        tokens = torch.from_numpy(named)
        rows = layout.starts[named] + len(extras) + np.arange(len(named))
        state.rows[to_device(rows, x.device)] = x[tokens.to(x.device)].to(dtype)
        return state
    if isinstance(bound, BoundProducts) and not kind.may_be_complete:
        wide = torch.promote_types(dtype, torch.float32)
        numbers, vectors = bound.products.coefficients.to(wide), bound.products.vectors.to(wide)
        block = state.rows.view(len(x), len(members), -1)
        at = to_device(named, x.device)
        block[:, len(extras) :] = (numbers[:, at, None] * vectors[at]).to(dtype)
        constant = torch.zeros_like(x[0], dtype=wide) if bound.bias is None else bound.bias.to(wide)
        if BIAS in extras:
            block[:, extras.index(BIAS)] = constant.to(dtype)
        if REST in extras:
            for n, of_all in enumerate(numbers):  # summed up as where all are made, so that it is rounded alike
                named = (of_all[:, None] * vectors).to(dtype).sum(0, dtype=wide)
                block[n, extras.index(REST)] = x[n].to(wide) - (constant if constant.ndim == 1 else constant[n]) - named
        return state
    every = initial_state(kind, adapter, trace, call.tokens, call.excluded, call.has_bias, dtype).block(0)
    state.set_block(0, every[:, to_device(members, every.device)])
    return state
