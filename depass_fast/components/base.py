"""The protocol of a component kind: its start, its components and their initial states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from ..adapters import Adapter
from ..inputs.hook_names import LAYER_INPUT, Site, parse_hook_name
from ..runtime.brief import brief_repr
from ..runtime.numbers import as_index
from ..state.state import Factors
from ..trace.record import Trace

if TYPE_CHECKING:
    from ..results.attribution import Attribution
    from ..results.layered import LayeredAttribution

T = TypeVar("T")
R = TypeVar("R", "Attribution", "LayeredAttribution")  # what `attribute` returns for a prompt
SeveralLayers: TypeAlias = Literal["all"] | Sequence[int | str]


class Entry(NamedTuple):
    """The place where components enter the residual stream: ``layer``'s input, or `resid_mid` behind its attention."""

    layer: int
    site: Literal["resid_pre", "resid_mid"]

    @property
    def first_end(self) -> int:
        """The first layer whose input the components are part of."""
        return self.layer + (self.site == "resid_mid")

    def check_end(self, last: int, n_layers: int, what: str, given: int | str | None) -> None:
        """Refuse to carry ``what`` is here to the input of layer ``last``, named ``given``, unless that lies ahead.

        Raises:
            ValueError: ``last`` lies before the first input that it is part of, or after the last layer.
        """
        if not self.first_end <= last <= n_layers:
            raise ValueError(f"end: {given!r} is out of range; {what} reach layers {self.first_end} to {n_layers}.")

    @property
    def order(self) -> int:
        """The number of the first module that the components pass: 2·l for layer l's attention, 2·l + 1 for its MLP."""
        return 2 * self.layer + (self.site == "resid_mid")


@dataclass(frozen=True, repr=False)
class ComponentKind:
    """A kind of component at a ``layer``: 0 to L-1, negative counts from the end, or a hook name (see ``hooks``).

    ``site`` is the place in that layer where the components enter the residual stream: before its attention
    (`resid_pre`), between attention and MLP (`resid_mid`) or after its MLP (`resid_post`).
    """

    layer: int | str = 0  # a number once it is made

    kind = ""  # not annotated: constants of the class, not fields
    site = "resid_pre"
    hooks = tuple(LAYER_INPUT)  # the hooks that may name the layer, as in `blocks.5.hook_resid_pre`
    may_be_complete = False  # the named components can be all of the hidden state, so that there is no `rest`
    complete_at_once = False  # they are that at every position or at none, but for the rounding of a position

    __repr__ = brief_repr  # kinds hold tensors and lists of any length

    def __post_init__(self) -> None:
        if isinstance(self.layer, str):
            for name, value in self.place(*parse_hook_name(self.layer, "layer", self.hooks)).items():
                object.__setattr__(self, name, value)

    def place(self, layer: int, hook: str) -> dict[str, Any]:
        """The fields that a hook of a layer stands for. Raises ValueError where they contradict those given."""
        return {"layer": layer + LAYER_INPUT.get(hook, 0)}

    def resolve(self, adapter: Adapter) -> int:
        """The layer, counted from 0. Raises ValueError if there is no such layer."""
        return self.number(self.layer, adapter)

    def number(self, layer: int | str, adapter: Adapter) -> int:
        """The number of a layer that is named as :attr:`layer` may be. Raises ValueError if there is none."""
        if isinstance(layer, str):
            layer = self.place(*parse_hook_name(layer, "layer", self.hooks))["layer"]
        n, layer = adapter.n_layers, as_index(layer, "layer")
        if not -n <= layer < n:
            raise ValueError(f"layer: {layer} is out of range; this model has layers 0 to {n - 1}.")
        return layer % n

    def start_site(self, adapter: Adapter) -> Site:
        """The site where the components enter the residual stream of this model.

        In a parallel layer attention and MLP read the same, so that attention's output enters after both.
        """
        site = cast(Site, self.site)
        return "resid_post" if site == "resid_mid" and adapter.is_parallel else site

    def entry(self, adapter: Adapter) -> Entry:
        """The place where the components enter; those that start after a layer's MLP enter the next layer."""
        layer, site = self.resolve(adapter), self.start_site(adapter)
        return Entry(layer + 1, "resid_pre") if site == "resid_post" else Entry(layer, site)

    def check(self, adapter: Adapter, lengths: Sequence[int]) -> None:
        """Raise an error if prompts of these ``lengths`` cannot be decomposed in this way; before any work."""
        self.resolve(adapter)

    def bound(self, adapter: Adapter, trace: Trace, prompt: int) -> ComponentKind:
        """This kind for one prompt of a trace. It differs where the components are not known before the trace is."""
        return self

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        """Labels of the named components of a prompt with these ``tokens``."""
        raise NotImplementedError

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        """Write the initial states of one prompt into all of ``out`` (N, M, D), without the extras."""
        raise NotImplementedError

    def filler(self, adapter: Adapter, trace: Trace, dtype: torch.dtype) -> Callable[[Tensor, int], None]:
        """Return :meth:`fill` for the prompts of a trace, as a function of ``out``, of ``dtype``, and the prompt.

        A kind that makes something for all prompts together makes it here, once.
        """
        return lambda out, prompt: self.fill(out, adapter, trace, prompt)

    def factors(self, adapter: Adapter, trace: Trace, prompt: int) -> Factors | None:
        """The initial states as products of numbers and vectors; None if the kind does not consist of such."""
        return None

    def fills(self, adapter: Adapter, trace: Trace) -> Sequence[slice]:
        """The parts of a state's width, of several streams, that hold nothing but these components and constants."""
        return ()

    def user_tensors(self) -> Sequence[Tensor]:
        """The tensors that the user gave; they carry the rounding of their dtype."""
        return ()

    def identity(self) -> tuple:
        """The marks of what the user gave, which tell these components from others of their kind, layer and site."""
        return tuple(id(tensor) for tensor in self.user_tensors())

    def each(self, adapter: Adapter) -> list[ComponentKind]:
        """This kind layer by layer: itself, unless several layers were asked for."""
        return [self]

    @property
    def is_layered(self) -> bool:
        """True if several layers were asked for, even in a list of one."""
        return False

    def single(self) -> ComponentKind:
        """This kind. Raises ValueError if it is of several layers."""
        if self.is_layered:
            raise ValueError("layers: only attribute() and plan() take several layers; give one layer here.")
        return self

    def constant(self, adapter: Adapter, trace: Trace, prompt: int, dtype: torch.dtype) -> Tensor | None:
        """The additive constant in the decomposed outputs, which goes to `bias`: (D,), or (N, D), or None."""
        return None


@dataclass(frozen=True, repr=False)
class LayerKind(ComponentKind, Generic[R]):
    """A kind that can be asked for in several layers at once: a decomposition for each of them.

    ``layers``, "all" or a list, makes `attribute` return a :class:`depass_fast.LayeredAttribution`; ``layer`` is not
    read then. Type checkers know it as ``LayerKind[LayeredAttribution]``, which the signatures of the kinds tell them.
    """

    layers: SeveralLayers | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.layer, str) and self.layer == "all":
            raise ValueError("layer: 'all' is no layer; for all layers give layers='all'.")
        if self.layers is not None and self.layer not in (0, None):
            raise ValueError(f"layers: give either layers={self.layers!r} or layer {self.layer!r}, not both.")
        super().__post_init__()

    @property
    def is_layered(self) -> bool:
        return self.layers is not None

    def each(self, adapter: Adapter) -> list[ComponentKind]:
        if self.layers is None:
            return [self]
        if isinstance(self.layers, str) and self.layers != "all":
            raise ValueError(f"layers: {self.layers!r} is neither 'all' nor a list of layers.")
        if not isinstance(self.layers, str) and not isinstance(self.layers, Sequence):
            raise TypeError(f"layers: expected 'all' or a list of layers, got {self.layers!r}.")
        named = self.those_with_it(adapter) if isinstance(self.layers, str) else list(self.layers)
        if not named and isinstance(self.layers, str):
            raise ValueError(f"layers: no layer of this model has what {type(self).__name__} are made of.")
        if not named:
            raise ValueError("layers: empty; give 'all' or at least one layer.")
        made = self.at_layers(named, adapter)
        outputs = dict.fromkeys(one.output for one in made)
        if len(outputs) > 1:
            found = ", ".join(outputs)
            raise ValueError(f"layers: {self.layers!r} name different outputs ({found}); ask for each by itself.")
        by_number = {(number := one.resolve(adapter)): replace(one, layer=number) for one in made}
        return [by_number[number] for number in sorted(by_number)]

    def those_with_it(self, adapter: Adapter) -> list[int]:
        """The layers that "all" stands for: those that have what is decomposed."""
        return list(range(adapter.n_layers))

    def at_layers(self, named: Sequence[int | str], adapter: Adapter) -> list[LayerKind]:
        """This kind at each of the ``named`` layers. A hook's name may say more than the layer."""
        return [replace(self, layer=layer, layers=None) for layer in named]

    @property
    def output(self) -> str:
        """The part of a layer that is decomposed, the same in all layers."""
        return self.site

    def resolve(self, adapter: Adapter) -> int:
        """The layer; the last of several, as all components are under way from there on."""
        if self.layers is None:
            return super().resolve(adapter)
        return max(kind.resolve(adapter) for kind in self.each(adapter))

    def entry(self, adapter: Adapter) -> Entry:
        """The place where the components enter; of several layers the last one."""
        if self.layers is None:
            return super().entry(adapter)
        return max((kind.entry(adapter) for kind in self.each(adapter)), key=lambda entry: entry.order)


def by_layer(
    given: Mapping[int | str, T] | Sequence[T],
    named: Sequence[int | str],
    number: Callable[[int | str], int],
    argument: str,
) -> list[T]:
    """The value for each of the ``named`` layers, from a mapping of layers to values or a list with one for each.

    ``number`` returns the number of a layer, or raises ValueError if there is none.

    Raises:
        ValueError: layers are missing, or one is named twice; a list of another length.
    """
    if not isinstance(given, Mapping):
        if len(given) != len(named):
            raise ValueError(f"{argument}: expected {len(named)}, one per layer, got {len(given)}.")
        return list(given)
    found: dict[int, T] = {}
    for key, value in given.items():
        if number(key) in found:
            raise ValueError(f"{argument}: layer {number(key)} is there twice; give one for each layer.")
        found[number(key)] = value
    wanted = [number(layer) for layer in named]
    if missing := [str(layer) for layer in wanted if layer not in found]:
        raise ValueError(
            f"{argument}: nothing for layer {', '.join(missing)}; give one for each layer, or layers={sorted(found)}."
        )
    return [found[layer] for layer in wanted]
