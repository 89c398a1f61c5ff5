"""The way of queries and keys between their projections and attention: the rotary embedding, measured.

Families embed positions in many ways: all dimensions or some, halves or neighbours, stretched, scaled, none at all in
some layers. All of them are linear, the same for every head, and mix at most two dimensions. So the model's own code is
asked: unit vectors take the place of the projections' outputs, the norms of the heads are left out, and what arrives at
attention are the coefficients (DESIGN.md section 9).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import Adapter
from ..adapters.query_key import head_norms, projections
from ..adapters.stored import stored_shape
from .exclusive import change_config, exclusive
from .plugged import active, attention_name
from .recorder import Recorder

_ALIKE = 64  # eps, of vectors between 0.5 and 1.5: rounding
_SIZE = 2.0**-8  # of the unit vectors, so that a clamp of queries and keys does not see them


class Turn(NamedTuple):
    """A linear map of d dimensions at each of N positions: out[j] = a[n, j] · x[first[j]] + b[n, j] · x[second[j]].

    ``first`` and ``second`` are (d,), ``a`` and ``b`` (N, d).
    """

    first: Tensor
    a: Tensor
    second: Tensor
    b: Tensor

    def apply(self, x: Tensor, at: Tensor | slice) -> Tensor:
        """Turn ``x`` (R, H, d), whose rows are at positions ``at`` (R,)."""
        a, b = (part[at, None].to(x.dtype) for part in (self.a, self.b))
        return torch.addcmul(x[..., self.first] * a, x[..., self.second], b)

    def back(self, y: Tensor) -> Tensor:
        """Apply the transpose to gradients ``y`` (..., N, H, d) at all positions."""
        a, b = (part[:, None].to(y.dtype) for part in (self.a, self.b))
        out = torch.zeros_like(y).index_add_(-1, self.first, y * a)
        return out.index_add_(-1, self.second, y * b)


class Turns(NamedTuple):
    """The maps of a layer's queries and of its keys."""

    q: Turn
    k: Turn


@torch.no_grad()
def measure_turns(adapter: Adapter, ids: Tensor, layers: Collection[int]) -> dict[int, Turns]:
    """Run the model over ``ids`` (N,), up to the last of ``layers``, and return the maps of these layers.

    Raises:
        ValueError: what a layer does between projections and attention is no such map.
    """
    watcher = _Watcher(adapter, ids.to(adapter.device), set(layers))
    with exclusive(adapter) as undo:
        if adapter.observed is None:
            change_config(adapter, "_attn_implementation", attention_name(adapter), undo)
        undo.callback(setattr, active, "recorder", getattr(active, "recorder", None))
        active.recorder = watcher
        watcher.enter([len(ids)])
        for index in layers:
            watcher.watch(index, undo)
        try:
            adapter.run(watcher.ids[None])
        except _Finished as finished:
            if finished.of is not watcher:
                raise
    return watcher.found


class _Finished(Exception):
    """All layers were asked; the rest of the forward pass is not needed."""

    def __init__(self, of: Any) -> None:
        super().__init__("all layers were asked")
        self.of = of


class _Arrived(Exception):
    """Queries (1, H, N, d) and keys (1, Hkv, N, d) that arrived at attention."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        super().__init__("queries and keys have arrived")
        self.q, self.k = q, k


class _Watcher(Recorder):
    """Asks layers for their maps as the forward pass comes to them. Else it attends as a recorder does."""

    def __init__(self, adapter: Adapter, ids: Tensor, layers: set[int]) -> None:
        super().__init__(adapter, is_checking=False)
        self.ids, self.wanted, self.found = ids, layers, {}
        self.distinct: list[Turns] = []
        self.asking = False

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, *args: Any, **how: Any) -> Tensor:
        """Attend, or stop here where the layer is only asked."""
        if self.asking:
            raise _Arrived(q, k)
        out = super().attend(index, q, k, v, *args, **how)
        self.layers[index].clear()  # nothing is kept
        return out

    def watch(self, index: int, undo: ExitStack) -> None:
        """Ask layer ``index`` as soon as its attention is called."""
        module = self.adapter.module(index, "attention")

        def called(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if getattr(active, "recorder", None) is not self or self.asking:
                return
            self.asking = True
            try:
                asked = _Question(self.adapter, index, len(self.ids), module, args, kwargs)
                self.found[index] = asked.turns(self.distinct)
                if not any(self.found[index] is one for one in self.distinct):
                    self.distinct.append(self.found[index])
            finally:
                self.asking = False
            if len(self.found) == len(self.wanted):
                raise _Finished(self)

        undo.callback(module.register_forward_pre_hook(called, with_kwargs=True).remove)


@dataclass
class _Question:
    """One layer, with the arguments that its attention was called with."""

    adapter: Adapter
    index: int
    n: int
    module: Any
    args: tuple
    kwargs: dict[str, Any]
    outputs: dict[int, Tensor] = field(default_factory=dict)  # of projections, by the module's id

    def turns(self, known: Sequence[Turns]) -> Turns:
        """Return the maps, given unit vector after unit vector; as many at once as there are KV heads.

        Where one of those ``known`` of other layers turns a random vector alike, it is that one.
        """
        weights = self.adapter.attention(self.index)
        heads, kv, d = weights.n_heads, weights.n_kv_heads, weights.key_dim
        sources = projections(self.adapter, self.index)
        apart = "shared" not in sources  # else every head has the same
        places = {name: _places(module, part) for name, (module, part) in sources.items()}
        widths = {id(module): width for (module, _), (_, width) in zip(sources.values(), places.values(), strict=True)}
        own = len(places["k"][0]) // kv
        of_q, of_k = [], []

        def arriving(vectors: Tensor) -> tuple[Tensor, Tensor]:
            """Return what becomes of vectors (Hkv, d), of one for all heads unless they are ``apart``."""
            filled = {key: vectors.new_zeros(width) for key, width in widths.items()}
            each = {"q": vectors.repeat_interleave(heads // kv, 0), "k": vectors}
            if not apart:
                each |= {"k": vectors[:, :own], "shared": vectors[0, own:]}
            for name, values in each.items():
                filled[id(sources[name][0])][places[name][0]] = values.flatten()
            q, k = self._arriving(filled)
            return q[:: heads // kv] / _SIZE, k / _SIZE

        with ExitStack() as undo:
            for norm in head_norms(self.adapter, self.index):
                undo.callback(norm.register_forward_pre_hook(self._left_out).remove)
                undo.callback(norm.register_forward_hook(self._replaced).remove)
            for module, _ in {id(module): (module, part) for module, part in sources.values()}.values():
                undo.callback(module.register_forward_pre_hook(self._shortened).remove)
                undo.callback(module.register_forward_hook(self._replaced).remove)
            vector = torch.rand(1, d, generator=torch.Generator().manual_seed(0)) + 0.5
            probe = arriving(vector.expand(kv, -1) * _SIZE)
            for one in known:
                if all(_is_alike(turn, vector, found[0]) for turn, found in zip(one, probe, strict=True)):
                    return one
            for begin in range(0, d, kv if apart else 1):
                units = torch.eye(d)[begin : begin + kv] if apart else torch.eye(d)[begin].expand(kv, -1)
                units = nn.functional.pad(units, (0, 0, 0, kv - len(units))) * _SIZE
                q, k = arriving(units)
                some = kv if apart else 1
                of_q.append(q[:some][: d - begin])
                of_k.append(k[:some][: d - begin])
        return Turns(*(self._turn(torch.cat(each)) for each in (of_q, of_k)))

    def _arriving(self, filled: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the queries (H, N, d) and keys (Hkv, N, d) that attention gets if the projections give ``filled``."""
        device, observed = self.adapter.layer_device(self.index), self.adapter.observed
        wide = torch.promote_types(self.adapter.dtype, torch.float32)
        self.outputs = {
            key: values.to(device, wide).expand(1, self.n, -1).contiguous() for key, values in filled.items()
        }
        if observed is not None:
            modules = [self.module.get_submodule(name) for name in observed.projections]
            q, k = (self._read(observed, modules)[name] for name in ("q", "k"))
            return q[0], k[0]
        try:
            self.module.forward(*self.args, **self.kwargs)
        except _Arrived as arrived:
            return arrived.q[0], arrived.k[0]
        raise RuntimeError(
            f"layer {self.index}: the forward pass did not go through transformers' attention interface."
        )

    def _read(self, observed: Any, modules: list[nn.Module]) -> dict[str, Any]:
        width = self.adapter.attention(self.index).v.shape[0]  # values are not asked for
        like = next(iter(self.outputs.values()))
        outputs = [self.outputs.get(id(module), like.new_zeros(1, self.n, width)) for module in modules]
        return observed.read(self.module, outputs, self.kwargs)

    def _shortened(self, module: nn.Module, args: tuple) -> tuple:
        """Give a projection, whose output will be replaced, the first position only, in the model's dtype."""
        return (args[0][..., :1, :].to(self.adapter.dtype), *args[1:])

    def _left_out(self, module: nn.Module, args: tuple) -> tuple:
        """Have the output of a norm replaced by its input."""
        self.outputs[id(module)] = args[0]
        return (args[0].to(self.adapter.dtype), *args[1:])

    def _replaced(self, module: nn.Module, args: tuple, output: Any) -> Tensor:
        return self.outputs[id(module)]

    def _turn(self, found: Tensor) -> Turn:
        """Return the map whose columns were measured: (d, N, d), what each of d unit vectors became."""
        used = (found != 0).any(1)  # (d, d)
        if int(used.sum(0).max()) > 2:
            raise ValueError(
                f"model: layer {self.index} of {type(self.adapter.model).__name__} mixes more than two dimensions of "
                "its queries or keys behind the projections; its attention cannot be explained."
            )
        order = torch.argsort(used.int(), dim=0, descending=True, stable=True)
        first, second = order[0], order[1] if len(order) > 1 else order[0]
        at = torch.arange(len(used), device=found.device)
        a, b = found[first, :, at].T.contiguous(), found[second, :, at].T.contiguous()
        return Turn(first, a, second, b * used[second, at] if len(order) > 1 else torch.zeros_like(b))


def _is_alike(turn: Turn, vector: Tensor, found: Tensor) -> bool:
    """Return if a map makes ``found`` (N, d) of a vector (1, d) at every position."""
    if turn.a.shape != found.shape:
        return False
    made = turn.apply(vector.to(found).expand(len(found), 1, -1), slice(None))[:, 0]
    return bool((made - found).abs().max() <= _ALIKE * torch.finfo(found.dtype).eps)


def _places(module: nn.Module, part: Any) -> tuple[Tensor, int]:
    """Return where a part is among the outputs of its module, (C',), and how many outputs there are."""
    width = stored_shape(module)[0]
    every = torch.arange(width)
    return (every if part is None else part(every)), width
