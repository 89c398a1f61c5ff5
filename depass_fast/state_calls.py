"""The calls of :class:`depass_fast.DePass` that return component states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .calls import Calls
from .components.base import ComponentKind
from .inputs.prompts import Prompt
from .methods.focus import Focus, Partition, focus, partition
from .methods.states import carry, check_trace, decompose, start_of
from .options import OptionValues
from .request import doubt_first_words
from .state.state import ComponentState
from .trace.record import Trace

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StateCalls(Calls):
    """Decompositions as states, at a layer or at all layers, for those who carry on from there."""

    @torch.no_grad()
    def decompose(
        self,
        prompt: Prompt | Sequence[Prompt] | Trace,
        components: ComponentKind,
        *,
        end: int | str | None = None,
        **options: Unpack[OptionValues],
    ) -> ComponentState:
        """Return the component state entering layer ``end`` (L: after the last layer); None: after the final norm.

        ``dense(p)`` of the result is (N, M, D) for prompt p, ``completeness_error`` is the error that was measured on
        the way, a float. Arguments and errors as in :meth:`depass_fast.DePass.attribute`.
        """
        self._of_all(options, "decompose")
        return decompose(doubt_first_words(self._request(prompt, components, end, options)))

    @torch.no_grad()
    def focus(
        self,
        prompt: Prompt | Trace,
        components: ComponentKind,
        which: Sequence[int | str] | int | str,
        *,
        partition: Partition | None = None,
        end: int | str | None = None,
        **options: Unpack[OptionValues],
    ) -> Focus:
        """Carry the components ``which``, labels or indices, alone and exactly, and keep them at every layer.

        The states are those before the final norm. They follow from a ``partition``; without one, one run over all
        components comes first. Arguments and errors as in :meth:`depass_fast.DePass.attribute`; one prompt.
        """
        self._of_all(options, "focus")
        return focus(doubt_first_words(self._request(prompt, components, end, options)), which, partition)

    @torch.no_grad()
    def partition(
        self,
        prompt: Prompt | Trace,
        components: ComponentKind,
        *,
        end: int | str | None = None,
        **options: Unpack[OptionValues],
    ) -> Partition:
        """Carry all components once and keep log Z of every layer, for :meth:`focus`. Arguments and errors as there."""
        self._of_all(options, "partition")
        return partition(doubt_first_words(self._request(prompt, components, end, options)))

    @torch.no_grad()
    def start(self, trace: Trace, components: ComponentKind, **options: Unpack[OptionValues]) -> ComponentState:
        """Return the components where they start, as :meth:`carry` takes them. Its rows may be changed.

        ``completeness_error`` of the result is None, as nothing was measured yet. Errors as in
        :meth:`depass_fast.DePass.attribute`.
        """
        check_trace(trace)
        self._of_all(options, "start")
        return start_of(doubt_first_words(self._request(trace, components, None, options)))

    @torch.no_grad()
    def carry(
        self, trace: Trace, state: ComponentState, end: int | str | None = None, **options: Unpack[OptionValues]
    ) -> ComponentState:
        """Carry a state, complete or not, to the input of layer ``end``; None: after the final norm. It is used up.

        ``completeness_error`` of the result is the largest that was measured from the start on, a float.

        Raises:
            ValueError: ``end`` does not lie before it, the trace is another model's or of other prompts.
        """
        return carry(self.adapter, trace, state, end, self._of_all(options, "carry").build(self.adapter))
