"""What a hidden state is split into: the initial decompositions (DESIGN.md section 2, *Decompositions*).

Every kind says where in the network it starts, which components it has, and fills their initial states. Whatever
they lack to the hidden state becomes `rest` (:mod:`depass_fast.initial`); so the sum is exact from the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .adapters import Adapter
from .hook_names import LAYER_INPUT, RESIDUAL, SITES, Site, parse_hook_name, place_in_residual
from .outputs import Outputs
from .prompts import as_index
from .state import BIAS, REST, Factors
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
class Heads(ComponentKind):
    """One component per attention head of ``layer``: its output, after W_O."""

    kind = "heads"
    site = "resid_mid"
    hooks = ("attn.hook_z", "attn.hook_result")

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        layer = self.resolve(adapter)
        return tuple(f"L{layer}H{h}" for h in range(adapter.layer(layer).attention.n_heads))

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        outputs = Outputs(adapter, trace, self.resolve(adapter), prompt, out.dtype)
        outputs.attend(outputs.values(), out)
        entering = outputs.entering(out, "attention")
        if entering is not out:
            out.copy_(entering)

    def constant(self, adapter: Adapter, trace: Trace, prompt: int, dtype: torch.dtype) -> Tensor | None:
        return Outputs(adapter, trace, self.resolve(adapter), prompt, dtype).constant("attention")


@dataclass(frozen=True)
class Modules(ComponentKind):
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
class Neurons(ComponentKind):
    """One component per MLP neuron of ``layer``, after its MLP: X[n, i] = a[n, i] · W_down[i].

    In a mixture of experts these are the neurons of every expert that any position was sent to, `L3E5N12`; a neuron's
    activation has the router's weight in it.
    """

    kind = "neurons"
    site = "resid_post"
    hooks = ("mlp.hook_post",)

    def bound(self, adapter: Adapter, trace: Trace, prompt: int) -> Products:
        layer = self.resolve(adapter)
        dtype = torch.promote_types(adapter.dtype, torch.float32)
        outputs = Outputs(adapter, trace, layer, prompt, dtype)
        names, products = outputs.neurons()
        labels = tuple(f"L{layer}{name}" for name in names)
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


@dataclass(frozen=True, eq=False)
class Subspaces(ComponentKind):
    """Projections of the input of ``layer`` on linear subspaces; the complement is `rest`.

    ``bases`` is a sequence of (D, k) matrices, orthonormalised here. They must be mutually orthogonal.
    """

    bases: Sequence[Tensor] = ()
    labels: Sequence[str] | None = None

    kind = "subspaces"
    may_be_complete = True

    def check(self, adapter: Adapter, lengths: Sequence[int]) -> None:
        super().check(adapter, lengths)
        self._orthonormal(adapter)
        _check_labels(self.labels, len(self.bases))

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        return tuple(self.labels or (f"L{self.resolve(adapter)}.subspace{i}" for i in range(len(self.bases))))

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        x = trace.resid(self.resolve(adapter))[trace.span(prompt)].to(out.dtype)
        for m, basis in enumerate(self._orthonormal(adapter)):
            basis = basis.to(out)
            out[:, m] = x @ basis @ basis.T

    def given(self) -> Sequence[Tensor]:
        return [torch.as_tensor(basis) for basis in self.bases]

    def _orthonormal(self, adapter: Adapter) -> list[Tensor]:
        """Orthonormal bases of the given subspaces, in float64, also of each other to its last digit."""
        if isinstance(self.bases, Tensor) and self.bases.ndim == 2:
            raise TypeError("bases: expected a list of (D, k) matrices, got one; write [basis].")
        if not len(self.bases):
            raise ValueError("bases: empty; give at least one (D, k) matrix.")
        done: list[Tensor] = []
        for i, basis in enumerate(self.bases):
            basis = torch.as_tensor(basis).detach().to("cpu", torch.float64)
            if basis.ndim != 2 or basis.shape[0] != adapter.hidden_size or not 1 <= basis.shape[1] <= basis.shape[0]:
                raise ValueError(
                    f"bases[{i}]: expected shape ({adapter.hidden_size}, k) with 1 ≤ k ≤ D, got {tuple(basis.shape)}."
                )
            if not basis.isfinite().all():
                raise ValueError(f"bases[{i}]: holds NaN or inf.")
            if torch.linalg.matrix_rank(basis) < basis.shape[1]:
                raise ValueError(f"bases[{i}]: its columns are linearly dependent.")
            basis = torch.linalg.qr(basis).Q
            for j, other in enumerate(done):
                overlap = (basis.T @ other).abs().max().item()
                if overlap > 1e-5:
                    raise ValueError(
                        f"bases[{j}] and bases[{i}] overlap (largest cosine {overlap:.2g}); subspaces must be mutually "
                        "orthogonal. Orthogonalise them, or give their sum as one subspace."
                    )
            for other in done:
                basis = basis - other @ (other.T @ basis)
            done.append(torch.linalg.qr(basis).Q)
        return done


@dataclass(frozen=True, eq=False)
class Custom(ComponentKind):
    """Any components: ``states`` (N, M, D) at ``site`` of ``layer``. What they lack to the hidden state is `rest`.

    ``site`` is by default what the name of the layer says, else `resid_pre`.
    """

    states: Tensor | None = None
    labels: Sequence[str] | None = None
    site: Site | None = None  # one of them once it is made

    kind = "custom"
    hooks = tuple(RESIDUAL)
    may_be_complete = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.site is None:
            object.__setattr__(self, "site", "resid_pre")

    def place(self, layer: int, hook: str) -> dict[str, Any]:
        return place_in_residual(layer, hook, self.site)

    def check(self, adapter: Adapter, lengths: Sequence[int]) -> None:
        super().check(adapter, lengths)
        check_site(self.site, adapter)
        if len(lengths) != 1:
            raise ValueError(f"Custom: its states belong to one prompt, got {len(lengths)} prompts.")
        states, expected = self.states, f"({lengths[0]}, M, {adapter.hidden_size})"
        if not isinstance(states, Tensor) or not states.is_floating_point():
            given = f"dtype {states.dtype}" if isinstance(states, Tensor) else type(states).__name__
            raise TypeError(f"states: expected a floating-point tensor of shape {expected}, got {given}.")
        if states.ndim != 3 or states.shape[::2] != (lengths[0], adapter.hidden_size) or states.shape[1] == 0:
            raise ValueError(f"states: expected shape {expected} with M ≥ 1, got {tuple(states.shape)}.")
        if not states.isfinite().all():
            raise ValueError("states: holds NaN or inf.")
        _check_labels(self.labels, states.shape[1])

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        return tuple(self.labels or (f"L{self.resolve(adapter)}.custom{m}" for m in range(self.states.shape[1])))

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        out.copy_(self.states)

    def given(self) -> Sequence[Tensor]:
        return (self.states,)


def check_site(site: str, adapter: Adapter) -> None:
    """Refuse a site that there is not, or not in this model."""
    if site not in SITES:
        raise ValueError(f"site: {site!r} is not one of {', '.join(map(repr, SITES))}.")
    if site == "resid_mid" and adapter.family.parallel:
        raise ValueError(
            "site: attention and MLP of this model's layers read the same, there is no 'resid_mid' between them; take "
            "'resid_pre' or 'resid_post'."
        )


def _check_labels(labels: Sequence[str] | None, count: int) -> None:
    if labels is None:
        return
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"labels: expected a list of strings, got {labels!r}.")
    if len(labels) != count:
        raise ValueError(f"labels: expected {count}, one per component, got {len(labels)}.")
    for label in labels:
        if label in (REST, BIAS) or list(labels).count(label) > 1:
            raise ValueError(
                f"labels: {label!r} is taken; labels must differ, {REST!r} and {BIAS!r} are the library's."
            )
