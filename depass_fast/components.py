"""What a hidden state is split into: the initial decompositions (DESIGN.md section 2, *Decompositions*).

Every kind says where in the network it starts, which components it has, and fills their initial states. Whatever
they lack to the hidden state becomes `rest` (:mod:`depass_fast.initial`); so the sum is exact from the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .adapters import Adapter
from .hook_names import LAYER_INPUT, Site, parse_hook_name
from .outputs import Outputs
from .prompts import as_index
from .state import Factors
from .trace import Trace

_MODULES = {"hook_attn_out": "attention", "hook_mlp_out": "mlp", "hook_resid_post": "both"}


@dataclass(frozen=True)
class ComponentKind:
    """A kind of component at a ``layer``: 0 to L-1, negative counts from the end, or a hook name (see ``hooks``).

    ``site`` is where in that layer the components enter the residual stream: before its attention (`resid_pre`),
    between attention and MLP (`resid_mid`) or after its MLP (`resid_post`).
    """

    layer: int | str = 0  # a number once it is made

    kind = ""  # not annotated: constants of the class, not fields
    site = "resid_pre"
    hooks = tuple(LAYER_INPUT)  # which may name the layer, as in `blocks.5.hook_resid_pre`
    may_be_complete = False  # whether the named components can be all of the hidden state, so that there is no `rest`

    def __post_init__(self) -> None:
        if isinstance(self.layer, str):
            for field, value in self.place(*parse_hook_name(self.layer, "layer", self.hooks)).items():
                object.__setattr__(self, field, value)

    def place(self, layer: int, hook: str) -> dict[str, Any]:
        """The fields that a hook of a layer stands for. Raises ValueError where they contradict those given."""
        return {"layer": layer + LAYER_INPUT.get(hook, 0)}

    def resolve(self, adapter: Adapter) -> int:
        """The layer, counted from 0. Raises ValueError where there is no such layer."""
        n = adapter.n_layers
        layer = as_index(self.layer, "layer")
        if not -n <= layer < n:
            raise ValueError(f"layer: {layer} is out of range; this model has layers 0 to {n - 1}.")
        return layer % n

    def start_site(self, adapter: Adapter) -> Site:
        """Where the components enter the residual stream of this model.

        In a parallel layer attention and MLP read the same, so that what attention adds enters after both.
        """
        return "resid_post" if self.site == "resid_mid" and adapter.family.parallel else self.site

    def check(self, adapter: Adapter, lengths: Sequence[int]) -> None:
        """Refuse before any work what cannot be decomposed, given the lengths of the prompts."""
        self.resolve(adapter)

    def bound(self, adapter: Adapter, trace: Trace, prompt: int) -> ComponentKind:
        """This kind for one prompt of a trace, where the components are not known before it is traced."""
        return self

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        """Labels of the named components of a prompt with these ``tokens``."""
        raise NotImplementedError

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        """Write the initial states of one prompt into all of ``out`` (N, M, D), without the extras."""
        raise NotImplementedError

    def factors(self, adapter: Adapter, trace: Trace, prompt: int) -> Factors | None:
        """The same as products of numbers and vectors, where the kind is made of such."""
        return None

    def given(self) -> Sequence[Tensor]:
        """The tensors that the user gave; they carry the rounding of their dtype."""
        return ()

    def each(self, adapter: Adapter) -> list[ComponentKind]:
        """This kind layer by layer: itself, unless several layers were asked for."""
        return [self]

    @property
    def is_layered(self) -> bool:
        """Whether several layers were asked for, be it in a list of one."""
        return False

    def single(self) -> ComponentKind:
        """This kind, if it is of one layer; else ValueError."""
        if self.is_layered:
            raise ValueError("layers: only attribute() takes several layers; give one layer here.")
        return self

    def constant(self, adapter: Adapter, trace: Trace, prompt: int, dtype: torch.dtype) -> Tensor | None:
        """What of the decomposed outputs is an additive constant, and thus `bias`: (D,), or (N, D), or None."""
        return None


@dataclass(frozen=True)
class Tokens(ComponentKind):
    """One component per token, at the input of ``layer``: X[n, m] = x[n] if m = n else 0."""

    kind = "tokens"

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{token!r}@{n}" for n, token in enumerate(tokens))

    def factors(self, adapter: Adapter, trace: Trace, prompt: int) -> Factors:
        return Factors(None, trace.resid(self.resolve(adapter))[trace.span(prompt)])


@dataclass(frozen=True)
class LayerKind(ComponentKind):
    """A kind that can be asked for in several layers at once: a decomposition for each of them.

    ``layers``, "all" or a list, makes `attribute` return a :class:`depass_fast.LayeredAttribution`; ``layer`` is not
    read then.
    """

    layers: Literal["all"] | Sequence[int | str] | None = field(default=None, kw_only=True)

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
        named = range(adapter.n_layers) if isinstance(self.layers, str) else self.layers
        made = [replace(self, layer=layer, layers=None) for layer in named]  # a hook's name may say more than the layer
        if not made:
            raise ValueError("layers: empty; give 'all' or at least one layer.")
        found = {replace(one, layer=one.resolve(adapter)) for one in made}
        if len({replace(one, layer=0) for one in found}) > 1:
            raise ValueError(f"layers: {list(named)!r} name different outputs; ask for each of them by itself.")
        return sorted(found, key=lambda one: one.layer)

    def resolve(self, adapter: Adapter) -> int:
        """The layer; of several, the last, which is the first that everything is under way at."""
        if self.layers is None:
            return super().resolve(adapter)
        return max(kind.resolve(adapter) for kind in self.each(adapter))


@dataclass(frozen=True)
class Heads(LayerKind):
    """One component per attention head of ``layer``: its output, after W_O."""

    kind = "heads"
    site = "resid_mid"
    hooks = ("attn.hook_z", "attn.hook_result")

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        layer = self.resolve(adapter)
        return tuple(f"L{layer}H{h}" for h in range(adapter.attention(layer).n_heads))

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        outputs = Outputs(adapter, trace, self.resolve(adapter), prompt, out.dtype)
        outputs.attend(outputs.values(), out)
        entering = outputs.entering(out, "attention")
        if entering is not out:
            out.copy_(entering)

    def constant(self, adapter: Adapter, trace: Trace, prompt: int, dtype: torch.dtype) -> Tensor | None:
        return Outputs(adapter, trace, self.resolve(adapter), prompt, dtype).constant("attention")


@dataclass(frozen=True)
class Modules(LayerKind):
    """The outputs of ``layer``'s modules: attention, MLP, or both.

    With ``which="both"`` (the default) and ``"mlp"`` the components start after the MLP; with ``"attention"`` between
    the two, so that the MLP of the same layer is shared out as well.
    """

    which: Literal["both", "attention", "mlp"] = "both"

    kind = "modules"
    hooks = tuple(_MODULES)

    @property
    def site(self) -> Site:
        return "resid_mid" if self.which == "attention" else "resid_post"

    @property
    def _chosen(self) -> tuple[str, ...]:
        return ("attention", "mlp") if self.which == "both" else (self.which,)

    def place(self, layer: int, hook: str) -> dict[str, Any]:
        if self.which not in ("both", _MODULES[hook]):
            raise ValueError(f"layer: {hook!r} is not the output of which={self.which!r}.")
        return {"layer": layer, "which": _MODULES[hook]}

    def check(self, adapter: Adapter, lengths: Sequence[int]) -> None:
        super().check(adapter, lengths)
        if self.which not in ("both", "attention", "mlp"):
            raise ValueError(f"which: {self.which!r} is not one of 'both', 'attention', 'mlp'.")

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        layer = self.resolve(adapter)
        both = {"attention": f"L{layer}.attn", "mlp": f"L{layer}.mlp"}
        return tuple(both.values()) if self.which == "both" else (both[self.which],)

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        outputs = Outputs(adapter, trace, self.resolve(adapter), prompt, out.dtype)
        for m, module in enumerate(self._chosen):
            whole = outputs.whole(module)
            out[:, m] = outputs.through_stream(whole, "mlp") if self._goes_on(module) else whole

    def constant(self, adapter: Adapter, trace: Trace, prompt: int, dtype: torch.dtype) -> Tensor | None:
        outputs = Outputs(adapter, trace, self.resolve(adapter), prompt, dtype)
        constants = []
        for module in self._chosen:
            constant = outputs.constant(module)
            if constant is not None:
                constants.append(outputs.through_stream(constant, "mlp") if self._goes_on(module) else constant)
        return sum(constants[1:], constants[0]) if constants else None

    def _goes_on(self, module: str) -> bool:
        """Whether what a module adds passes the end of the layer before the components start."""
        return module == "attention" and self.site == "resid_post"


@dataclass(frozen=True)
class Neurons(LayerKind):
    """One component per MLP neuron of ``layer``, after its MLP: X[n, i] = a[n, i] · W_down[i].

    In a mixture of experts these are the neurons of every expert that any position was sent to, `L3E5N12`; a neuron's
    activation has the router's weight in it.
    """

    kind = "neurons"
    site = "resid_post"
    hooks = ("mlp.hook_post",)

    def count(self, adapter: Adapter) -> int:
        """How many neurons the layer has, at most."""
        return sum(mlp.w_down.shape[1] for mlp in adapter.mlps(self.resolve(adapter)))

    def counts(self, adapter: Adapter, trace: Trace) -> list[int]:
        """How many neurons every prompt of a trace has: of the MLP, or of the experts that any position was sent to."""
        found = np.zeros(trace.n_prompts, np.int64)
        for mlp in trace.layers[self.resolve(adapter)].mlps:
            reached = 1 if mlp.sent is None else np.diff(np.searchsorted(mlp.sent, trace.offsets)) > 0
            found += mlp.act.shape[1] * reached
        return found.tolist()

    def bound(self, adapter: Adapter, trace: Trace, prompt: int) -> Products:
        layer = self.resolve(adapter)
        dtype = torch.promote_types(adapter.dtype, torch.float32)
        outputs = Outputs(adapter, trace, layer, prompt, dtype)
        labels, products = outputs.neurons(f"L{layer}")
        return Products(layer=layer, labels=labels, products=products, bias=outputs.constant("mlp"), site=self.site)


@dataclass(frozen=True, eq=False, kw_only=True)
class Products(ComponentKind):
    """Components of one prompt that are numbers times vectors, with what else they bring to ``bias``."""

    labels: tuple[str, ...]
    products: Factors
    bias: Tensor | None
    site: Site

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        return self.labels

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        """Write products of numbers and vectors into all of ``out`` (N, M, D)."""
        numbers, vectors = self.products.coefficients.to(out.dtype), self.products.vectors.to(out.dtype)
        torch.mul(numbers[..., None], vectors, out=out)

    def factors(self, adapter: Adapter, trace: Trace, prompt: int) -> Factors:
        return self.products

    def constant(self, adapter: Adapter, trace: Trace, prompt: int, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)
