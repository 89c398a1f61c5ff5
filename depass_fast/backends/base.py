"""The one seam between the engine and its kernels: three operations on a component state, and what callers may ask.

A backend knows tensors, never a model. Every implementation inherits :class:`Backend` and passes the same test suite;
callers use nothing of a backend that is not declared here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..adapters import Adapter, Attention, Layer, Mlp, Norm
from ..allocation import Allocation
from ..runtime.ranks import Ranks
from ..state.layout import Layout
from ..state.state import ComponentState
from ..trace.record import AttentionTrace, LayerTrace, MlpTrace, Trace

Made = TypeVar("Made")


class Backend(ABC):
    """Carries a component state through a layer. Weights, trace and state are on one device, unless it ``streams``.

    name: stands in results, warnings and plans.
    jagged: carries rows of any layout, those of a joint state and of chosen components included.
    joins: carries the states of several layers as one.
    streams: the state stays in host memory and passes through the device in blocks.
    streamable: a user who chose it may ask for ``stream=True``.
    compute_dtype: dtype of the products; None: that of the state.
    ranks: the processes that share the components of every prompt; None: this one carries all of them.
    """

    name: str
    jagged: bool = True
    joins: bool = True
    streams: bool = False
    streamable: bool = False
    compute_dtype: torch.dtype | None = None
    ranks: Ranks | None = None

    # -- the operations -----------------------------------------------------------------------------------------

    @abstractmethod
    def aggregate_ov(
        self,
        state: ComponentState,
        weights: Attention,
        trace: AttentionTrace,
        queries: Layout | None = None,
        source: ComponentState | None = None,
    ) -> ComponentState:
        """Apply the frozen attention to every component's values (DESIGN.md section 2, *Attention*).

        X[q, m] += Σ_h Σ_k P[h, q, k] · (s[k] · (γ ⊙ X[k, m]) W_V) W_O, and its constants to `bias`. With ``queries``
        only those positions are computed and kept. ``state`` must carry all positions; it is used up. ``source``, of
        the same layout, is the state that values are read from where that is another one, maybe of another width.
        """

    @abstractmethod
    def allocate_mlp(
        self,
        state: ComponentState,
        weights: Mlp,
        trace: MlpTrace,
        allocation: Allocation,
        source: ComponentState | None = None,
    ) -> ComponentState:
        """Share out an MLP's frozen activations among the components (DESIGN.md section 2, *MLP*).

        X[n, m] += Σ_i w[n, m, i] · act[n, i] · W_down[i], and its constants to `bias`. ``state`` is used up.
        ``source``, of the same layout, is the state that the MLP reads where that is another one: in a parallel layer,
        and where several experts add to the same state. All positions must have been sent to this MLP.
        """

    @abstractmethod
    def read_out(self, state: ComponentState, norm: Norm | None, resid: Tensor, directions: Tensor) -> Tensor:
        """Return every row's dot product with ``directions`` (K, D), after the frozen ``norm`` of ``resid`` (T, D).

        The result is (R, K).
        """

    # -- around them, with defaults -----------------------------------------------------------------------------

    def missed(self, state: ComponentState, resid: Tensor) -> tuple[Tensor, Tensor]:
        """Return ‖Σ_m X[n, m] - x[n]‖ at every segment, and ‖x[n]‖ at every position of ``resid`` (T, D).

        (S,) and (T,), or (S, B) and (T, B): norms of B blocks of columns. The default is the state's own.
        """
        return state.missed(resid)

    def begin(self, adapter: Adapter, trace: Trace, first: int, end: int) -> None:  # noqa: B027 (a hook)
        """Take note that states of ``trace`` pass the layers from ``first`` to ``end`` (excluded) next."""

    def expect(self, layer: Layer, trace: LayerTrace, allocation: Allocation) -> None:  # noqa: B027 (a hook)
        """Take note that the next attention is that of ``layer``, at all positions, and its MLP comes right after it.

        A backend that gathers something for the MLP while the attention passes needs to know. The default ignores it.
        """

    def prepare(self, device: torch.device, make: Callable[[], Made]) -> Made:
        """Return what ``make`` makes on ``device``; it must not write to a state.

        A backend with a workspace tries again with less of it where memory runs out. The default does not.
        """
        return make()

    def workspace_bytes(self, device: torch.device) -> int | None:
        """Return the bytes of workspace that the backend keeps to by now; None: it keeps to none."""
        return None
