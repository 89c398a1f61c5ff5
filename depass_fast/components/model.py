"""The initial decompositions of a hidden state into the model's own parts (DESIGN.md section 2, *Decompositions*).

Every kind knows the place where it starts and its components, and fills their initial states. The hidden state minus
their sum becomes `rest` (:mod:`depass_fast.components.start`), so that the sum is exact from the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter
from ..inputs.hook_names import Site
from ..labels import position_labels
from ..state.state import Factors
from ..trace.record import Trace
from .base import ComponentKind, LayerKind, R, SeveralLayers
from .outputs import LayerOutputs
from .products import Bound, BoundAlong, BoundProducts, BoundSpread

if TYPE_CHECKING:
    from ..results.attribution import Attribution
    from ..results.layered import LayeredAttribution

Which: TypeAlias = Literal["both", "attention", "mlp"]

_MODULES = {"hook_attn_out": "attention", "hook_mlp_out": "mlp", "hook_resid_post": "both"}


@dataclass(frozen=True, repr=False)
class Tokens(ComponentKind):
    """One component per token, at the input of ``layer``: X[n, m] = x[n] if m = n else 0."""

    kind = "tokens"

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        return tuple(position_labels(tokens))

    def factors(self, adapter: Adapter, trace: Trace, prompt: int) -> Factors:
        return Factors(None, trace.resid(self.resolve(adapter))[trace.span(prompt)])


@dataclass(frozen=True, repr=False)
class Heads(LayerKind[R]):
    """One component per attention head of ``layer``: its output, after W_O."""

    kind = "heads"
    site = "resid_mid"
    hooks = ("attn.hook_z", "attn.hook_result")

    if TYPE_CHECKING:  # when it runs, the dataclass makes its own

        @overload
        def __init__(self: Heads[Attribution], layer: int | str = 0, *, layers: None = None) -> None: ...

        @overload
        def __init__(self: Heads[LayeredAttribution], layer: int | str = 0, *, layers: SeveralLayers) -> None: ...

        def __init__(self, *_: Any, **__: Any) -> None: ...

    def those_with_it(self, adapter: Adapter) -> list[int]:
        return [layer for layer in range(adapter.n_layers) if adapter.has_attention(layer)]

    def check(self, adapter: Adapter, lengths: Sequence[int]) -> None:
        super().check(adapter, lengths)
        if not adapter.has_attention(self.resolve(adapter)):
            raise ValueError(f"components: layer {self.resolve(adapter)} has no heads: it does not mix positions.")

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        layer = self.resolve(adapter)
        return tuple(f"L{layer}H{h}" for h in range(adapter.attention(layer).n_heads))

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        self.filler(adapter, trace, out.dtype)(out, prompt)

    def filler(self, adapter: Adapter, trace: Trace, dtype: torch.dtype) -> Callable[[Tensor, int], None]:
        whole = LayerOutputs(adapter, trace, self.resolve(adapter), None, dtype)
        values, several = whole.values(), whole.record.streams

        def fill(out: Tensor, prompt: int) -> None:
            outputs = whole.at(trace.span(prompt))
            raw = out if several is None else out.new_empty(*out.shape[:2], adapter.hidden_size)
            outputs.attend(values[outputs.span], raw)
            entering = outputs.entering(raw, "attention")
            if entering is not out:
                out.copy_(entering)

        return fill

    def fills(self, adapter: Adapter, trace: Trace) -> Sequence[slice]:
        streams, width = trace.layers[self.resolve(adapter)].streams, adapter.hidden_size
        mix = None if streams is None else streams.attention.mix  # (T, m, n)
        alone = [] if mix is None else (mix == 0).all(2).all(0).nonzero().flatten().tolist()
        return [slice(one * width, (one + 1) * width) for one in alone]

    def constant(self, adapter: Adapter, trace: Trace, prompt: int, dtype: torch.dtype) -> Tensor | None:
        return LayerOutputs(adapter, trace, self.resolve(adapter), prompt, dtype).constant("attention")


@dataclass(frozen=True, repr=False)
class Modules(LayerKind[R]):
    """The outputs of ``layer``'s modules: attention, MLP, or both.

    With ``which="both"`` (the default) and ``"mlp"`` the components start after the MLP. With ``"attention"`` they
    start between the two, so that the MLP of the same layer is shared out as well.
    """

    which: Which = "both"

    kind = "modules"
    hooks = tuple(_MODULES)

    if TYPE_CHECKING:  # when it runs, the dataclass makes its own

        @overload
        def __init__(
            self: Modules[Attribution], layer: int | str = 0, which: Which = "both", *, layers: None = None
        ) -> None: ...

        @overload
        def __init__(
            self: Modules[LayeredAttribution], layer: int | str = 0, which: Which = "both", *, layers: SeveralLayers
        ) -> None: ...

        def __init__(self, *_: Any, **__: Any) -> None: ...

    @property
    def site(self) -> Site:
        return "resid_mid" if self.which == "attention" else "resid_post"

    @property
    def output(self) -> str:
        return self.which

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
        layer = self.resolve(adapter)
        if self.which != "both" and self.which not in self._there(adapter):
            raise ValueError(f"which: layer {layer} has no {'attention' if self.which == 'attention' else 'MLP'}.")

    def _there(self, adapter: Adapter) -> tuple[str, ...]:
        """Return those of the chosen modules that the layer has."""
        layer = self.resolve(adapter)
        has = {"attention": adapter.has_attention(layer), "mlp": adapter.has_mlp(layer)}
        return tuple(module for module in self._chosen if has[module])

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        layer = self.resolve(adapter)
        short = {"attention": "attn", "mlp": "mlp"}
        return tuple(f"L{layer}.{short[module]}" for module in self._there(adapter))

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        outputs = LayerOutputs(adapter, trace, self.resolve(adapter), prompt, out.dtype)
        for m, module in enumerate(self._there(adapter)):
            whole = outputs.whole(module)
            out[:, m] = outputs.through_stream(whole, "mlp") if self._goes_on(module) else whole

    def constant(self, adapter: Adapter, trace: Trace, prompt: int, dtype: torch.dtype) -> Tensor | None:
        outputs = LayerOutputs(adapter, trace, self.resolve(adapter), prompt, dtype)
        constants = []
        for module in self._there(adapter):
            constant = outputs.constant(module)
            if constant is not None:
                constants.append(outputs.through_stream(constant, "mlp") if self._goes_on(module) else constant)
        return sum(constants[1:], constants[0]) if constants else None

    def _goes_on(self, module: str) -> bool:
        """True if the output of a module passes the end of the layer before the components start."""
        return module == "attention" and self.site == "resid_post"


@dataclass(frozen=True, repr=False)
class Neurons(LayerKind[R]):
    """One component per MLP neuron of ``layer``, after its MLP: X[n, i] = a[n, i] · W_down[i].

    In a mixture of experts these are the neurons of every expert that any position was sent to, `L3E5N12`; a neuron's
    activation has the router's weight in it.
    """

    kind = "neurons"
    site = "resid_post"
    hooks = ("mlp.hook_post",)

    if TYPE_CHECKING:  # when it runs, the dataclass makes its own

        @overload
        def __init__(self: Neurons[Attribution], layer: int | str = 0, *, layers: None = None) -> None: ...

        @overload
        def __init__(self: Neurons[LayeredAttribution], layer: int | str = 0, *, layers: SeveralLayers) -> None: ...

        def __init__(self, *_: Any, **__: Any) -> None: ...

    def those_with_it(self, adapter: Adapter) -> list[int]:
        return [layer for layer in range(adapter.n_layers) if adapter.has_mlp(layer)]

    def check(self, adapter: Adapter, lengths: Sequence[int]) -> None:
        super().check(adapter, lengths)
        if not adapter.has_mlp(self.resolve(adapter)):
            raise ValueError(f"components: layer {self.resolve(adapter)} has no neurons: it has no MLP.")

    def count(self, adapter: Adapter) -> int:
        """The number of neurons of the layer, experts included."""
        return sum(mlp.w_down.shape[1] for mlp in adapter.mlps(self.resolve(adapter)))

    def counts(self, adapter: Adapter, trace: Trace) -> list[int]:
        """The neurons of every prompt of a trace: of the MLP, or of the experts that any position was sent to."""
        found = np.zeros(trace.n_prompts, np.int64)
        for mlp in trace.layers[self.resolve(adapter)].mlps:
            reached = (
                1 if mlp.host_positions is None else np.diff(np.searchsorted(mlp.host_positions, trace.offsets)) > 0
            )
            found += mlp.act.shape[1] * reached
        return found.tolist()

    def constant(self, adapter: Adapter, trace: Trace, prompt: int, dtype: torch.dtype) -> Tensor | None:
        """Return the constant that :meth:`bound` brings to `bias`, without making the neurons."""
        return LayerOutputs(adapter, trace, self.resolve(adapter), prompt, dtype).constant("mlp")

    def bound(self, adapter: Adapter, trace: Trace, prompt: int) -> Bound:
        layer = self.resolve(adapter)
        dtype = torch.promote_types(adapter.dtype, torch.float32)
        outputs = LayerOutputs(adapter, trace, layer, prompt, dtype)
        if outputs.has_parts:
            labels, parts = outputs.neuron_names(f"L{layer}"), outputs.parts()
            return BoundSpread(layer=layer, labels=labels, parts=parts, bias=outputs.constant("mlp"), site="resid_post")
        labels, products = outputs.neurons(f"L{layer}")
        spread = adapter.mlps(layer)[0].spread
        if spread is not None:
            bias = outputs.constant("mlp")
            return BoundAlong(
                layer=layer, labels=labels, products=products, bias=bias, site="resid_post", spread=spread
            )
        return BoundProducts(
            layer=layer, labels=labels, products=products, bias=outputs.constant("mlp"), site="resid_post"
        )
