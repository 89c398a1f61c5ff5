"""The one seam between the engine and its kernels: three operations on a component state.

A backend knows tensors, never a model; every implementation passes the same test-suite.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..adapters import Attention, Mlp, Norm
from ..allocation import Allocation
from ..state.layout import Layout
from ..state.state import ComponentState
from ..trace.record import AttentionTrace, MlpTrace


class Backend(Protocol):
    """What carries a component state through a layer. Weights, trace and state are on one device."""

    name: str

    def aggregate_ov(
        self, state: ComponentState, weights: Attention, trace: AttentionTrace, queries: Layout | None = None
    ) -> ComponentState:
        """Frozen attention applied to every component's values (DESIGN.md section 2, *Attention*).

        X[q, m] += Σ_h Σ_k P[h, q, k] · (s[k] · (γ ⊙ X[k, m]) W_V) W_O, and its constants to `bias`. With ``queries``
        only those positions are computed and kept. ``state`` must carry all positions; it is used up.
        """
        ...

    def allocate_mlp(
        self,
        state: ComponentState,
        weights: Mlp,
        trace: MlpTrace,
        allocation: Allocation,
        source: ComponentState | None = None,
    ) -> ComponentState:
        """An MLP's frozen activations shared out among the components (DESIGN.md section 2, *MLP*).

        X[n, m] += Σ_i w[n, m, i] · act[n, i] · W_down[i], and its constants to `bias`. ``state`` is used up.
        ``source``, of the same layout, is the state that the MLP reads where that is another one: in a parallel layer,
        and where several experts add to the same state. All positions must have been sent to this MLP.
        """
        ...

    def read_out(self, state: ComponentState, norm: Norm | None, resid: Tensor, directions: Tensor) -> Tensor:
        """Every row's dot product with ``directions`` (K, D), after the frozen ``norm`` of ``resid`` (T, D): (R, K)."""
        ...
