"""Components that the user gives: linear subspaces, and any vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter
from ..inputs.hook_names import RESIDUAL, SITES, Site, place_in_residual
from ..labels import BIAS, REST
from ..trace.record import Trace
from .base import ComponentKind


@dataclass(frozen=True, eq=False, repr=False)
class Subspaces(ComponentKind):
    """Projections of the input of ``layer`` on linear subspaces; the complement is `rest`.

    ``bases`` is a sequence of (D, k) matrices, orthonormalised here. They must be mutually orthogonal.
    """

    bases: Sequence[Tensor] = ()
    labels: Sequence[str] | None = None

    kind = "subspaces"
    may_be_complete = True
    complete_at_once = True  # projections are exact: the rounding of a basis leaves a part of every state over

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

    def user_tensors(self) -> Sequence[Tensor]:
        return [b if isinstance(b, Tensor) else torch.as_tensor(b, device="cpu") for b in self.bases]

    def _orthonormal(self, adapter: Adapter) -> list[Tensor]:
        """Orthonormal bases of the subspaces, in float64, orthogonal to each other to the last digit."""
        if isinstance(self.bases, Tensor) and self.bases.ndim == 2:
            raise TypeError("bases: expected a list of (D, k) matrices, got one; write [basis].")
        if not len(self.bases):
            raise ValueError("bases: empty; give at least one (D, k) matrix.")
        done: list[Tensor] = []
        for i, basis in enumerate(self.bases):
            basis = torch.as_tensor(basis, dtype=torch.float64, device="cpu").detach()
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


@dataclass(frozen=True, eq=False, repr=False)
class Custom(ComponentKind):
    """Any components: ``states`` (N, M, D) at ``site`` of ``layer``. The hidden state minus their sum is `rest`.

    ``site`` is by default that of the layer's hook name, else `resid_pre`.
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
        count = self._checked_states.shape[1]
        return tuple(self.labels or (f"L{self.resolve(adapter)}.custom{m}" for m in range(count)))

    def fill(self, out: Tensor, adapter: Adapter, trace: Trace, prompt: int) -> None:
        out.copy_(self._checked_states[: len(out)])  # the trace may end at the position that is read

    def user_tensors(self) -> Sequence[Tensor]:
        return (self._checked_states,)

    @property
    def _checked_states(self) -> Tensor:
        assert self.states is not None  # see check
        return self.states


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
