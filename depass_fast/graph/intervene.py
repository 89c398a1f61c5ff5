"""The model run again with one node of a graph changed. It is handed back as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import Norm
from ..trace.again import next_logits
from ..trace.exclusive import exclusive
from ..trace.held import check_holdable, held_attention
from .model import GraphModel
from .seats import FEATURE, HEAD, NEURON

if TYPE_CHECKING:
    from .record import DirectShares, Node

_HELD = ("attention", "norms")


class Intervention(NamedTuple):
    """A node's activation changed, and what became of the target.

    ``node`` is its id, ``scale`` the factor of its activation; ``before`` and ``after`` are the activation, None for a
    token's. ``predicted`` is the change of the target by the graph: (scale - 1) · the node's share. ``actual`` is the
    change in the model: ``target_after`` - ``target_before``, the target as the model has it: a logit, a difference of
    two, a log-probability, or a product with a vector. ``hold`` is what was held in the model's run.
    """

    node: str
    scale: float
    before: float | None
    after: float | None
    predicted: float
    actual: float
    target_before: float
    target_after: float
    hold: tuple[str, ...]


@torch.no_grad()
def intervened(
    graph: DirectShares, node: Node, scale: float | None, value: float | None, hold: Sequence[str]
) -> Intervention:
    """Run the model without and with a change of a node. Arguments and errors as of ``Graph.intervene``."""
    model, factor = graph.model, _factor(node, scale, value)
    if isinstance(hold, str) or any(one not in _HELD for one in hold):
        raise ValueError(f"hold: expected a list of {', '.join(map(repr, _HELD))}, got {hold!r}.")
    if model is None:
        raise ValueError("graph: it holds no model to run; make it by dp.graph(...).")
    if "attention" in hold:
        check_holdable(model.adapter)
    model.check()
    change = _change(model, node, factor - 1.0)
    norms, held = _norms(model), tuple(one for one in _HELD if one in hold)
    norms_held = "norms" in held
    with exclusive(model.adapter):
        if () not in model.runs:
            with _noting(norms) as scales:
                model.runs[()] = _target(graph, model), scales
        scales = model.runs[()][1]
        attention = held_attention(model.adapter, model.trace) if "attention" in hold else nullcontext()
        with attention, _holding(norms, scales if norms_held else {}):
            if held not in model.runs:  # what is held rounds otherwise
                model.runs[held] = _target(graph, model), scales
            with change():
                after = _target(graph, model)
    if not math.isfinite(after):
        name, given = ("scale", 0.0 if scale is None else scale) if value is None else ("value", value)
        advice = " Held norms do not limit what grows: leave 'norms' out of hold." if norms_held else ""
        raise ValueError(f"{name}: with {given!r} the model gives no finite target.{advice}")
    before = model.runs[held][0]
    share = node.share or 0.0
    changed = None if node.activation is None else node.activation * factor
    return Intervention(
        node.id, factor, node.activation, changed, (factor - 1.0) * share, after - before, before, after, held
    )


def _factor(node: Node, scale: float | None, value: float | None) -> float:
    """Return the factor of a node's activation.

    ValueError for a node without one, two ways of saying it, and what is no finite number.
    """
    for name, given in (("scale", scale), ("value", value)):
        if given is not None and not _is_number(given):
            raise ValueError(f"{name}: expected a finite number, got {given!r}.")
    if node.kind not in ("token", HEAD, NEURON, FEATURE):
        raise ValueError(f"node: {node.id!r} cannot be changed; choose a token, a head, a neuron or a feature.")
    if value is None:
        return 0.0 if scale is None else float(scale)
    if scale is not None:
        raise ValueError("value: give either scale or value.")
    if not node.activation:
        raise ValueError(f"value: {node.id!r} has no activation to be set; give scale.")
    return float(value) / node.activation


def _is_number(given: object) -> bool:
    if not isinstance(given, Real) or isinstance(given, bool):
        return False
    try:
        return math.isfinite(given)
    except OverflowError:  # an int of hundreds of digits
        return False


# -- what is read -----------------------------------------------------------------------------------------------------


def _target(graph: DirectShares, model: GraphModel) -> float:
    """Return the target as the model has it."""
    ids, (token, contrast) = torch.tensor(graph.input_ids)[None], graph.target_ids
    if token is None:
        return _product(model, ids)
    logits = next_logits(model.adapter, ids)[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if graph.target_kind == "log-prob":
        return float(logits.log_softmax(-1)[token])
    return float(logits[token] - (0.0 if contrast is None else logits[contrast]))


def _product(model: GraphModel, ids: Tensor) -> float:
    """Return the product of the normed final hidden state with the target's vector."""
    module, found = model.adapter.final_norm_module, []
    if module is None:
        raise ValueError("target: this model has no final norm, behind which a vector could be read again.")
    handle = module.register_forward_hook(lambda _module, _args, out: found.append(out))
    try:
        next_logits(model.adapter, ids)
    finally:
        handle.remove()
    vector = model.ways.reads.readout.directions[0].vectors[0]
    return float(found[0].flatten(0, -2)[-1].to(vector) @ vector)


# -- what is changed --------------------------------------------------------------------------------------------------


def _change(model: GraphModel, node: Node, by: float) -> Callable[[], Any]:
    """Return what changes a node while it is entered: ``by`` times what it gives now is added."""
    adapter = model.adapter
    if node.kind == "token":
        position = node.position or 0
        return lambda: _entering(adapter.block(0), position, by * model.trace.layers[0].resid_pre[position])
    seat = model.seat(node.id)
    if seat.kind == FEATURE:
        return _change_of_stream(model, seat.part, seat.position, by * model.written(seat))
    if seat.kind == HEAD and adapter.kind(seat.layer).head_experts is not None:  # no module is given all heads
        module, added = adapter.module(seat.layer, "attention"), by * model.raw_head(seat)
        return lambda: _leaving(_there(module), seat.position, added)
    if seat.kind == HEAD:
        d = adapter.attention(seat.layer).head_dim
        own = slice(seat.index * d, (seat.index + 1) * d)
        module, added = adapter.module(seat.layer, "o_proj"), by * model.before_output(seat)
    elif adapter.is_mixture(seat.layer):  # experts need not be modules: what they write together is changed
        module, added = adapter.module(seat.layer, "mlp"), by * model.raw(seat)
        return lambda: _leaving(_there(module), seat.position, added)
    else:
        module, own = adapter.module(seat.layer, "down_proj"), slice(seat.index, seat.index + 1)
        added = by * model.trace.layers[seat.layer].mlps[seat.part].act[seat.position, own]
    return lambda: _entering(_there(module), seat.position, added, own)


def _change_of_stream(model: GraphModel, dictionary: int, position: int, added: Tensor) -> Callable[[], Any]:
    """Return what adds a vector (D,) to the stream where a dictionary reads."""
    (layer, site), adapter = list(model.ways.dictionaries)[dictionary], model.adapter
    if site == "resid_pre":
        module = adapter.block(layer) if layer < adapter.n_layers else adapter.final_norm_module
        return lambda: _entering(_there(module), position, added)
    branch = adapter.attention(layer)
    if branch.stream is not None:
        raise ValueError("node: behind this model's attention a norm is on the stream itself; nothing is added there.")
    output = None if branch.output is None else adapter.module(layer, "attention_output_norm")
    module = adapter.module(layer, "o_proj") if output is None else output
    return lambda: _leaving(_there(module), position, added / branch.factor)


def _there(module: nn.Module | None) -> nn.Module:
    if module is None:
        raise ValueError("node: the module that it is part of is not there to be changed.")
    return module


@contextmanager
def _entering(module: nn.Module, position: int, added: Tensor, own: slice = slice(None)) -> Iterator[None]:
    """Add numbers to what a module reads at a position, of one prompt."""

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (_added(args[0], position, added, own), *args[1:]), kwargs
        name = next(iter(kwargs))  # hidden states come first
        return args, {**kwargs, name: _added(kwargs[name], position, added, own)}

    handle = module.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _leaving(module: nn.Module, position: int, added: Tensor) -> Iterator[None]:
    """Add numbers to what a module gives at a position, of one prompt; of several outputs to the first."""

    def leave(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
        if isinstance(out, tuple):
            return (_added(out[0], position, added), *out[1:])
        return _added(out, position, added)

    handle = module.register_forward_hook(leave)
    try:
        yield
    finally:
        handle.remove()


def _added(x: Tensor, position: int, added: Tensor, own: slice = slice(None)) -> Tensor:
    changed = x.clone()
    changed.view(-1, x.shape[-1])[position, own] += added.to(x)
    return changed


# -- what is held -----------------------------------------------------------------------------------------------------


def _norms(model: GraphModel) -> list[tuple[nn.Module, Norm]]:
    return list({id(module): (module, norm) for module, norm in model.adapter.norms()}.values())


@contextmanager
def _noting(norms: Sequence[tuple[nn.Module, Norm]]) -> Iterator[dict[int, Tensor]]:
    """Note the scales of norms in the forward pass inside, by their modules' ids."""
    found: dict[int, Tensor] = {}

    def noter(norm: Norm) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            found[id(module)] = norm.scale(args[0].flatten(0, -2))

        return note

    with ExitStack() as undo:
        for module, norm in norms:
            undo.callback(module.register_forward_pre_hook(noter(norm)).remove)
        yield found


@contextmanager
def _holding(norms: Sequence[tuple[nn.Module, Norm]], scales: dict[int, Tensor]) -> Iterator[None]:
    """Have norms work with these scales in the forward pass inside."""

    def holder(norm: Norm, scale: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
        def hold(_module: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor:
            x = args[0].flatten(0, -2)
            y = norm.apply(x.to(scale.dtype), scale)
            y = y if norm.bias is None else y + norm.bias.to(y)
            return y.to(out).view_as(out)

        return hold

    with ExitStack() as undo:
        for module, norm in norms:
            if id(module) in scales:
                undo.callback(module.register_forward_hook(holder(norm, scales[id(module)])).remove)
        yield
