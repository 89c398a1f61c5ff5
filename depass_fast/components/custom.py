"""Components that the user gives: linear subspaces, and any vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter
from ..inputs.hook_names import RESIDUAL, SITES, Site, place_in_residual
from ..labels import BIAS, REST
from ..trace.record import Trace
from .arrays import Bases, as_tensor, is_array
from .base import ComponentKind, LayerKind, R, SeveralLayers, by_layer

if TYPE_CHECKING:
    from ..results.attribution import Attribution
    from ..results.layered import LayeredAttribution

Array: TypeAlias = Tensor | np.ndarray
SomeBases: TypeAlias = Sequence[Array] | Array


@dataclass(frozen=True, eq=False, repr=False)
class Subspaces(LayerKind[R]):
    """Projections of the input of ``layer`` on linear subspaces; the complement is `rest`.

    Args:
        bases: a list of (D, k) matrices or (D,) directions: tensors or NumPy arrays of any dtype, on any device. They
            are copied, and orthonormalised in float64. They must be mutually orthogonal, up to the rounding of their
            dtype. With ``layers`` the list serves every layer; or there is a mapping of layers to such lists, or a list
            of them, one per layer.
        labels: one per basis. Of several layers they have the layer in front, `L3.probe`.

    Raises:
        TypeError: ``bases`` is something else.
    """

    bases: Any = ()  # Bases once they are made; those of each layer in a mapping or a list
    labels: Sequence[str] | None = None

    kind = "subspaces"
    may_be_complete = True
    complete_at_once = True  # projections are exact: the rounding of a basis leaves a part of every state over

    if TYPE_CHECKING:  # when it runs, the dataclass makes its own

        @overload
        def __init__(
            self: Subspaces[Attribution],
            layer: int | str = 0,
            bases: SomeBases = (),
            labels: Sequence[str] | None = None,
            *,
            layers: None = None,
        ) -> None: ...

        @overload
        def __init__(
            self: Subspaces[LayeredAttribution],
            layer: int | str = 0,
            bases: SomeBases | Mapping[Any, SomeBases] | Sequence[SomeBases] = (),
            labels: Sequence[str] | None = None,
            *,
            layers: SeveralLayers,
        ) -> None: ...

        def __init__(self, *_: Any, **__: Any) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "bases", self._read())

    def _read(self) -> Bases | dict[Any, Bases] | list[Bases]:
        """The bases as they were given, or those of each layer."""
        given = self.bases
        if isinstance(given, Bases):
            return given
        is_list = isinstance(given, Sequence) and len(given) and all(_is_list_of_arrays(one) for one in given)
        if not is_list and not isinstance(given, Mapping):
            return Bases(given)
        if self.layers is None:
            raise TypeError("bases: bases for each layer go with layers='all', or with a list of layers.")
        items = given.items() if isinstance(given, Mapping) else enumerate(given)
        made = {key: one if isinstance(one, Bases) else Bases(one, f"bases[{key!r}]") for key, one in items}
        return made if isinstance(given, Mapping) else list(made.values())

    def at_layers(self, named: Sequence[int | str], adapter: Adapter) -> list[LayerKind]:
        number, bases = lambda layer: self.number(layer, adapter), self.bases
        bases = [bases] * len(named) if isinstance(bases, Bases) else by_layer(bases, named, number, "bases")
        return [
            replace(self, layer=layer, layers=None, bases=one, labels=self._labels_at(number(layer)))
            for layer, one in zip(named, bases, strict=True)
        ]

    def user_tensors(self) -> Sequence[Tensor]:
        return self.bases

    def identity(self) -> tuple:
        return self.bases.digest  # bases are copies

    def _labels_at(self, layer: int) -> Sequence[str] | None:
        """The labels with a layer's number in front, so that those of different layers differ."""
        if self.labels is None:
            return None
        _check_labels(self.labels, len(self.labels))
        return [f"L{layer}.{label}" for label in self.labels]

    def check(self, adapter: Adapter, lengths: Sequence[int]) -> None:
        super().check(adapter, lengths)
        for one in self.each(adapter):
            assert isinstance(one, Subspaces)
            one.bases.check(adapter.stream_width)
            _check_labels(one.labels, len(one.bases))

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        return tuple(self.labels or (f"L{self.resolve(adapter)}.subspace{i}" for i in range(len(self.bases))))

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        wide = torch.promote_types(out.dtype, torch.float32)  # a basis in half precision is orthonormal no more
        x = trace.resid(self.resolve(adapter))[trace.span(prompt)].to(out.device, wide)
        for m, basis in enumerate(self.bases.orthonormal):
            basis = basis.to(x)
            out[:, m] = x @ basis @ basis.T


@dataclass(frozen=True, eq=False, repr=False)
class Custom(ComponentKind):
    """Any components: ``states`` (N, M, D) at ``site`` of ``layer``. The hidden state minus their sum is `rest`.

    ``states`` is a tensor or a NumPy array of floating-point numbers of any precision, on any device, or a list of M
    arrays (N, D), one per component. ``site`` is by default that of the layer's hook name, else `resid_pre`.
    """

    states: Array | Sequence[Array] | None = None  # a tensor once they are made
    labels: Sequence[str] | None = None
    site: Site | None = None  # one of them once it is made

    kind = "custom"
    hooks = tuple(RESIDUAL)
    may_be_complete = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.site is None:
            object.__setattr__(self, "site", "resid_pre")
        if self.states is not None:
            object.__setattr__(self, "states", _read_states(self.states))

    def place(self, layer: int, hook: str) -> dict[str, Any]:
        return place_in_residual(layer, hook, self.site)

    def check(self, adapter: Adapter, lengths: Sequence[int]) -> None:
        super().check(adapter, lengths)
        check_site(self.site, adapter)
        if len(lengths) != 1:
            raise ValueError(f"Custom: its states belong to one prompt, got {len(lengths)} prompts.")
        width = adapter.width_at(str(self.site))
        states, expected = self.states, f"({lengths[0]}, M, {width})"
        if not isinstance(states, Tensor) or not states.is_floating_point():
            given = f"dtype {states.dtype}" if isinstance(states, Tensor) else type(states).__name__
            raise TypeError(
                f"states: expected a floating-point tensor of shape {expected}, such an array, or a list of M arrays "
                f"({lengths[0]}, {width}), got {given}."
            )
        if states.ndim != 3 or states.shape[::2] != (lengths[0], width) or states.shape[1] == 0:
            raise ValueError(f"states: expected shape {expected} with M ≥ 1, got {tuple(states.shape)}.")
        if not states.isfinite().all():
            raise ValueError("states: holds NaN or inf.")
        _check_labels(self.labels, states.shape[1])

    def names(self, adapter: Adapter, tokens: Sequence[str]) -> tuple[str, ...]:
        count = self._checked_states.shape[1]
        return tuple(self.labels or (f"L{self.resolve(adapter)}.custom{m}" for m in range(count)))

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        out.copy_(self._checked_states[: len(out)])  # the trace may end at the position that is read

    def user_tensors(self) -> Sequence[Tensor]:
        return (self._checked_states,)

    @property
    def _checked_states(self) -> Tensor:
        assert isinstance(self.states, Tensor)  # see check
        return self.states


def _read_states(given: Any) -> Any:
    """States (N, M, D) as a tensor; something else as it is."""
    if is_array(given):
        return as_tensor(given, "states")
    if not isinstance(given, list | tuple) or not all(is_array(one) for one in given):
        return given
    parts = [as_tensor(one, f"states[{m}]") for m, one in enumerate(given)]
    if not parts or parts[0].ndim != 2 or any(part.shape != parts[0].shape for part in parts):
        shapes = ", ".join(dict.fromkeys(str(tuple(part.shape)) for part in parts))
        raise ValueError(f"states: expected a list of M arrays (N, D), one per component, got {shapes or 'none'}.")
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    return torch.stack([part.to(parts[0].device, dtype) for part in parts], dim=1)


def _is_list_of_arrays(given: Any) -> bool:
    if isinstance(given, Bases):
        return True
    return isinstance(given, list | tuple) and len(given) > 0 and is_array(given[0]) and np.ndim(given[0]) > 0


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


def check_site(site: str | None, adapter: Adapter) -> None:
    """Raise ValueError for a site that does not exist, or not in this model."""
    if site not in SITES:
        raise ValueError(f"site: {site!r} is not one of {', '.join(map(repr, SITES))}.")
    if site == "resid_mid" and adapter.is_parallel:
        raise ValueError(
            "site: attention and MLP of this model's layers read the same, there is no 'resid_mid' between them; take "
            "'resid_pre' or 'resid_post'."
        )
