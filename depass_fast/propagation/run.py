"""The checked options of one call, as the layer loop needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..allocation import Allocation
from ..backends import Backend
from ..results.verification import Verification
from ..runtime.ranks import Ranks
from ..state.state import ComponentState
from ..trace.record import AttentionTrace, Trace
from .verify import Verifier


@dataclass(frozen=True)
class Run:
    """The checked options of one call."""

    allocation: Allocation
    backend: Backend
    state_dtype: torch.dtype
    memory_budget: int | None
    progress: bool = True
    verifier: Verifier | None = None
    shares_values: bool = False  # the activations of a recurrence's values, by the allocation; False: they are frozen

    @property
    def operations(self) -> Backend:
        """The backend for the steps of a layer and the readout, watched if ``verify`` was given."""
        return self.backend if self.verifier is None else self.verifier.around(self.backend)

    @property
    def value_rule(self) -> Allocation | None:
        """The allocation of the activations behind a recurrence's values; None: they are frozen at their ratios.

        That is the same under a linear rule: such an activation is zero at zero, and has no up projection beside it.
        """
        return self.allocation if self.shares_values and self.allocation.linear_rule is None else None

    def frozen(self, attention: AttentionTrace) -> AttentionTrace:
        """Return a layer's frozen attention, with the allocation of its values' activations where they are shared."""
        if self.value_rule is None or attention.recurrence is None or attention.value_ratio is None:
            return attention
        return replace(attention, value_rule=self.value_rule)

    def watch(self, trace: Trace, reads: Sequence[Sequence[int]] | None) -> None:
        """Begin to verify states of ``trace``, read at ``reads`` of every prompt; without ``verify`` do nothing."""
        if self.verifier is not None:
            self.verifier.begin(trace, reads)

    def verified(self) -> Verification | None:
        """Return what was found since :meth:`watch`; None without ``verify``."""
        return None if self.verifier is None else self.verifier.found()

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype of the products; None: that of the state."""
        return self.backend.compute_dtype

    @property
    def host(self) -> bool:
        """True if the state stays in host memory."""
        return self.backend.streams

    @property
    def ranks(self) -> Ranks | None:
        """The processes that share the components of every prompt; None: this one carries all of them."""
        return self.backend.ranks

    def summed(self, part: Tensor) -> Tensor:
        """Return the sum over all components, from a sum over those that this process carries."""
        if self.ranks is None:
            return part
        wide = torch.promote_types(part.dtype, torch.float32)
        return self.ranks.sum(part.to(wide)).to(part)

    def missed(self, state: ComponentState, resid: Tensor) -> tuple[Tensor, Tensor]:
        """Measure a state's completeness beside ``resid`` (T, D), see :meth:`Backend.missed`."""
        if self.ranks is None:
            return self.backend.missed(state, resid)
        return state.missed(resid, self.summed)

    def workspace(self, device: torch.device) -> int | None:
        """Return the bytes of workspace that the backend keeps to by now; None: it keeps to none."""
        return self.backend.workspace_bytes(device)
