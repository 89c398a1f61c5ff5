"""The starts of a sweep: one prompt's named components at one layer, as products or dense, `rest` and `bias`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..adapters import Adapter
from ..components.base import ComponentKind
from ..components.start import initial_state
from ..labels import BIAS, REST
from ..runtime.precision import full_precision
from ..state.state import Factors
from ..trace.record import Trace


class Named(Protocol):
    """M named components at N positions, in the state's dtype; some may be zero at some positions."""

    def __len__(self) -> int: ...

    def rows(self, index: Tensor) -> Tensor:
        """Return the initial states of some: (k,) -> (k, N, D)."""
        ...

    def sum(self, signs: Tensor | None = None) -> Tensor:
        """Return their sum, or Σ signs[m] · X[n, m]: (N, D)."""
        ...

    def project(self, x: Tensor) -> Tensor:
        """Return Σ_n x[k, n] · X[n, m]: (K, N, D) -> (K, M)."""
        ...

    def sizes(self, scale: Tensor, gamma: Tensor | None) -> Tensor:
        """Return each one's largest s[n] · ‖γ ⊙ X[n, m]‖, with s (N,) and γ (D,) in the state's dtype: (M,)."""
        ...

    def alive(self) -> Tensor:
        """Return numbers (N, M) of any dtype that are zero just where a component is exactly zero."""
        ...

    def directions(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return vectors (k, D) of some, in a dtype of their own, and how much of them lies at each position, (N, k).

        These amounts may be negative.
        """
        ...

    def first(self, n: int) -> Named:
        """Return the same at the first ``n`` positions."""
        ...


@dataclass(frozen=True)
class ProductRows:
    """Components ``coefficients`` (N, M) times ``vectors`` (M, D): neurons, features.

    The vectors may be a model's own weights: they are widened where they are used, and never kept.
    """

    coefficients: Tensor
    vectors: Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    def rows(self, index: Tensor) -> Tensor:
        return self.coefficients[:, index].T[..., None] * self.vectors[index].to(self.coefficients)[:, None]

    def sum(self, signs: Tensor | None = None) -> Tensor:
        return (self.coefficients if signs is None else self.coefficients * signs) @ self._wide()

    def project(self, x: Tensor) -> Tensor:
        return ((x @ self._wide().T) * self.coefficients).sum(1)

    def sizes(self, scale: Tensor, gamma: Tensor | None) -> Tensor:
        amounts = torch.linalg.vector_norm(self.coefficients * scale[:, None], torch.inf, dim=0)
        vectors = self._wide() if gamma is None else self.vectors * gamma
        return amounts * torch.linalg.vector_norm(vectors, dim=1)

    def alive(self) -> Tensor:
        return self.coefficients * self.vectors.any(1)

    def directions(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.vectors[index], self.coefficients[:, index]

    def _wide(self) -> Tensor:
        return self.vectors.to(self.coefficients)

    def first(self, n: int) -> ProductRows:
        return ProductRows(self.coefficients[:n], self.vectors)


@dataclass(frozen=True)
class DenseRows:
    """Components as vectors per position: ``states`` (N, M, D)."""

    states: Tensor

    def __len__(self) -> int:
        return self.states.shape[1]

    def rows(self, index: Tensor) -> Tensor:
        return self.states[:, index].transpose(0, 1)

    def sum(self, signs: Tensor | None = None) -> Tensor:
        return self.states.sum(1) if signs is None else torch.einsum("nmd,m->nd", self.states, signs)

    def project(self, x: Tensor) -> Tensor:
        return torch.einsum("nmd,knd->km", self.states, x)

    def sizes(self, scale: Tensor, gamma: Tensor | None) -> Tensor:
        states = self.states if gamma is None else self.states * gamma
        return (states.norm(dim=2) * scale[:, None]).amax(0)

    def alive(self) -> Tensor:
        return (self.states != 0).any(-1)

    def directions(self, index: Tensor) -> tuple[Tensor, Tensor]:
        states = self.states[:, index]
        sizes = states.norm(dim=2)
        at = sizes.argmax(0)  # one position stands for all
        vectors = states[at, torch.arange(len(index), device=at.device)]
        return vectors, sizes / sizes.amax(0).clamp_min(torch.finfo(sizes.dtype).tiny)

    def first(self, n: int) -> DenseRows:
        return DenseRows(self.states[:n])


@dataclass(eq=False)
class Start:
    """One start layer of a sweep.

    ``layer`` is the kind's; the components enter layer ``entering``, after its attention where ``mid``. ``rest`` (N, D)
    or None where the components are complete; ``bias`` (N, D), zero where the decomposition has no constant of its own.
    """

    layer: int
    entering: int
    mid: bool
    names: tuple[str, ...]
    named: Named
    rest: Tensor | None
    bias: Tensor
    has_bias: bool
    whole: bool | None = None  # no named component is exactly zero anywhere; None: not yet known, see all_alive


@full_precision()
def make_start(
    kind: ComponentKind,
    adapter: Adapter,
    trace: Trace,
    prompt: int,
    n: int,
    has_bias: bool,
    dtype: torch.dtype,
    bound: ComponentKind | None = None,
) -> Start:
    """Return the components of ``kind`` at the first ``n`` positions of a prompt, on the device of their layer.

    ``has_bias`` says that constants are still to come, ``bound`` is the kind for this prompt if it is known. The split
    is that of :func:`initial_state`, but products are not written down as vectors per position.
    """
    layer = kind.resolve(adapter)
    bound = bound or kind.bound(adapter, trace, prompt)
    entry, device = kind.entry(adapter), adapter.layer_device(layer)
    x = trace.resid_at(entry.layer, entry.site).to(device)[trace.span(prompt)].to(dtype)
    constant = bound.constant(adapter, trace, prompt, dtype)
    bias = x.new_zeros(n, x.shape[1])
    if constant is not None:
        bias, has_bias = bias + constant, True
    found = _products(kind, bound.factors(adapter, trace, prompt), x, constant)
    if found is None:
        named, rest, has_bias = _dense(kind, adapter, trace, prompt, has_bias, dtype)
    else:
        named, rest = found
    return Start(
        layer=layer,
        entering=entry.layer,
        mid=entry.site == "resid_mid",
        names=bound.names(adapter, [""] * len(x)),
        named=named.first(n),
        rest=None if rest is None else rest[:n],
        bias=bias,
        has_bias=has_bias,
    )


def _products(
    kind: ComponentKind, factors: Factors | None, x: Tensor, constant: Tensor | None
) -> tuple[Named, Tensor] | None:
    """Return components that are products, and `rest` (N, D); None if they are none, or may leave nothing over."""
    if factors is None or factors.coefficients is None:
        return None
    named = ProductRows(factors.coefficients.to(x), factors.vectors.to(x.device))
    rest = x - named.sum() if constant is None else x - named.sum() - constant
    return None if kind.may_be_complete and _rounding(rest, x).any() else (named, rest)


def _dense(
    kind: ComponentKind, adapter: Adapter, trace: Trace, prompt: int, has_bias: bool, dtype: torch.dtype
) -> tuple[Named, Tensor | None, bool]:
    """Return the components, `rest` (N, D) if there is one, and if there is `bias`: as exact propagation starts.

    :func:`initial_state` is the library's one way to tell rounding from a `rest`.
    """
    state = initial_state(kind, adapter, trace, has_bias=has_bias, dtype=dtype)
    block, extras = state.block(prompt), state.layout.components[prompt].extras
    rest = block[:, extras.index(REST)] if REST in extras else None
    return DenseRows(block[:, len(extras) :]), rest, BIAS in extras


def all_alive(starts: Sequence[Start]) -> list[bool]:
    """Return for every start if no named component is exactly zero anywhere; only the first call waits for a device."""
    if any(start.whole is None for start in starts):
        found = [start.named.alive().all() for start in starts]
        for start, whole in zip(starts, torch.stack([w.to(found[0].device) for w in found]).tolist(), strict=True):
            start.whole = whole
    return [bool(start.whole) for start in starts]


def _rounding(rest: Tensor, x: Tensor) -> Tensor:
    """Return where `rest` is so small that it may be rounding (N,); generous, as initial_state has the last word."""
    return rest.norm(dim=1) <= 0.01 * x.norm(dim=1)
