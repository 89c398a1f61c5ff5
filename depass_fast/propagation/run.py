"""The options of one call, checked: what the layer loop needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..allocation import Allocation
from ..backends import Backend, StreamBackend
from ..results.verification import Verification
from ..trace.record import Trace
from .verify import Verifier


@dataclass(frozen=True)
class Run:
    """The options of one call, checked."""

    allocation: Allocation
    backend: Backend
    state_dtype: torch.dtype
    compute_dtype: torch.dtype
    memory_budget: int | None
    progress: bool = True
    verifier: Verifier | None = None

    @property
    def steps(self) -> Backend:
        """The backend for the steps of a layer and the readout, watched where that was asked for."""
        return self.backend if self.verifier is None else self.verifier.around(self.backend)

    def watch(self, trace: Trace, reads: Sequence[Sequence[int]] | None) -> None:
        """Begin to verify, where that was asked for: states of ``trace``, read at ``reads`` of every prompt."""
        if self.verifier is not None:
            self.verifier.begin(trace, reads)

    def verified(self) -> Verification | None:
        """What was found since; None where nothing was asked for."""
        return None if self.verifier is None else self.verifier.found()

    @property
    def host(self) -> bool:
        """Whether the state stays in host memory."""
        return isinstance(self.backend, StreamBackend)

    def workspace(self, device: torch.device) -> int | None:
        """Bytes of workspace that the backend keeps to by now; None where it keeps to none."""
        budget = getattr(self.backend, "budget", None)
        return None if budget is None else budget.bytes(device)
