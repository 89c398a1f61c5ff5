"""The components of one prompt in a state, position by position, with what is no row of it: constants and places."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..labels import BIAS
from ..state.state import ComponentState

POSITION = "position"  # what is added to a key for its place: ALiBi


@dataclass(frozen=True)
class PromptRows:
    """The rows of one prompt, in the order that users see: the named components, then `rest` and `bias`.

    ``labels`` ends in the components that no row has: `bias`, where only queries, keys or sinks have constants, and
    `position`, where a place has a logit of its own. ``bias`` and ``position`` are their indices; None where they are
    not.
    """

    state: ComponentState
    prompt: int
    labels: tuple[str, ...]
    bias: int | None
    position: int | None
    places: tuple[int, ...] | None = None  # the local positions that are held; None: all

    @staticmethod
    def of(state: ComponentState, prompt: int, has_constants: bool, has_positions: bool) -> PromptRows:
        """Return the rows of a prompt, with components for constants and places where there are such."""
        labels = list(state.labels_of(prompt))
        own = len(labels) - 1 if BIAS in state.layout.components[prompt].extras else None
        if own is None and has_constants:
            own = len(labels)
            labels.append(BIAS)
        place = len(labels) if has_positions else None
        labels += [POSITION] if has_positions else []
        return PromptRows(state, prompt, tuple(labels), own, place)

    def only(self, positions: list[int]) -> PromptRows:
        """Return a copy of the rows at some local positions, which are asked for by their old numbers."""
        first = self.state.layout.segments(self.prompt).start
        return replace(self, state=self.state.take(np.array(positions) + first), places=tuple(positions))

    def at(self, position: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows (R, D) at a local position, as ``like`` is, and the indices (R,) of their components."""
        layout = self.state.layout
        place = position if self.places is None else self.places.index(position)
        segment = layout.segments(self.prompt).start + place
        first, count = int(layout.starts[segment]), int(layout.counts[segment])
        components = layout.components[self.prompt]
        extras, m = len(components.extras), len(components)
        index = torch.arange(count, device=like.device)
        return self.state.rows[first : first + count].to(like), (index - extras) % m

    def dots(self, gradients: Tensor, positions: range) -> Tensor:
        """Return ⟨gradients[h, n], X[n, m]⟩ of ``gradients`` (H, n, D) at local ``positions``: (H, n, M)."""
        out = gradients.new_zeros(len(gradients), len(positions), len(self.labels))
        for i, position in enumerate(positions):
            rows, index = self.at(position, gradients)
            out[:, i, index] = gradients[:, i] @ rows.T
        return out

    def summed_dots(self, gradients: Tensor, positions: range) -> Tensor:
        """Return the sum of :meth:`dots` over the positions, (H, M)."""
        out = gradients.new_zeros(len(gradients), len(self.labels))
        for i, position in enumerate(positions):
            rows, index = self.at(position, gradients)
            out[:, index] += gradients[:, i] @ rows.T
        return out
