"""The component state: every hidden state written as a sum of components, as the rows of a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..runtime.brief import brief
from ..runtime.terminal import encodable
from ..runtime.transfer import to_device

if TYPE_CHECKING:
    from ..results.verification import Verification
from .layout import Layout


@dataclass(frozen=True)
class Factors:
    """One prompt's named components as products: at position n component m is ``coefficients``[n, m] · ``vectors``[m].

    Tokens, neurons and features have this form where they start. ``coefficients`` is (N, M), or None for the identity
    (each component at its own position only); ``vectors`` is (M, D).
    """

    coefficients: Tensor | None
    vectors: Tensor


@dataclass
class ComponentState:
    """The rows (R, D) of a layout, in the state's dtype, entering ``layer`` at ``site``: `resid_pre`, or `resid_mid`.

    ``factors``, one per prompt, are the named components as products, as long as they are where they started.
    ``verification`` is the result of ``verify=True`` in the call that made the state. ``completeness_error`` is the
    largest ‖Σ_m X[n, m] - x[n]‖ / ‖x[n]‖ that was measured on its way: a float in what `decompose` and `carry` return,
    None in what `start` returns. ``earlier`` are copies of the state at places, (layer, site), that later layers read
    once more: for values, or for experts ahead of their layer; None for none.
    """

    rows: Tensor
    layout: Layout
    layer: int
    site: str = "resid_pre"
    factors: tuple[Factors, ...] | None = None
    verification: Verification | None = None
    completeness_error: float | None = None
    earlier: dict[Any, ComponentState] | None = None

    def __repr__(self) -> str:
        prompts, named = len(self.layout.components), brief(self.labels)
        error = "" if self.completeness_error is None else f", completeness error {self.completeness_error:.1e}"
        return encodable(
            f"ComponentState({prompts} prompt{'s' * (prompts > 1)}, the first with components {named}; "
            f"rows {brief(self.rows)} entering layer {self.layer} at {self.site}{error})"
        )

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def labels(self) -> list[str]:
        """Component labels of the first prompt, in the order of :meth:`dense`."""
        return self.labels_of(0)

    def labels_of(self, prompt: int) -> list[str]:
        """Component labels of one prompt, in the order of :meth:`dense`."""
        return self.layout.components[self._checked(prompt)].labels

    @property
    def nbytes(self) -> int:
        return self.rows.numel() * self.rows.element_size()

    def dense(self, prompt: int = 0) -> Tensor:
        """The state of one prompt as a tensor (N, M, D), components in the order of the labels, zero where not alive.

        N counts the positions that the state still carries: all of them unless it was pruned to a readout.
        """
        extras = len(self.layout.components[self._checked(prompt)].extras)
        view = self._view(prompt)
        if view is None and not extras:
            return self.block(prompt)
        return torch.roll(self.block(prompt) if view is None else view, -extras, dims=1)

    def _checked(self, prompt: int) -> int:
        count = len(self.layout.components)
        if not 0 <= prompt < count:
            raise IndexError(f"prompt: {prompt} is out of range; this state holds {count} (0 to {count - 1}).")
        return prompt

    def block(self, prompt: int) -> Tensor:
        """A copy of the state of one prompt, (N, M, D) like :meth:`dense`, but in row order."""
        view = self._view(prompt)
        if view is not None:
            return view.clone()
        mask = self.mask(prompt)
        out = self.rows.new_zeros(*mask.shape, self.rows.shape[1])
        out[mask] = self.rows[self.layout.rows(prompt)]
        return out

    def _view(self, prompt: int) -> Tensor | None:
        """The rows themselves as a block, where every component is alive everywhere."""
        rows, counts = self.rows[self.layout.rows(prompt)], self.layout.counts[self.layout.segments(prompt)]
        m = len(self.layout.components[prompt])
        return rows.view(len(counts), m, rows.shape[1]) if (counts == m).all() else None

    def set_block(self, prompt: int, values: Tensor) -> None:
        """Write a dense (N, M, D) block in row order back into the rows."""
        self.factors = None
        self.rows[self.layout.rows(prompt)] = values[self.mask(prompt)]

    def at(self, layout: Layout) -> ComponentState:
        """The same state at the positions of ``layout``, which are some of its own and keep all their components."""
        return ComponentState(self.take(self.layout.find(layout)).rows, layout, self.layer)

    def take(self, segments: np.ndarray) -> ComponentState:
        """A copy of some of the segments (S',)."""
        rows = to_device(self.layout.rows_of(segments), self.device)
        return ComponentState(self.rows[rows], self.layout.only(segments), self.layer, self.site)

    def put(self, part: ComponentState, segments: np.ndarray) -> None:
        """Write back the rows of some of the segments, as :meth:`take` returned them."""
        self.factors = None
        self.rows.index_copy_(0, to_device(self.layout.rows_of(segments), self.device), part.rows)

    @staticmethod
    def join(states: Sequence[ComponentState]) -> ComponentState:
        """Several decompositions at the same place, as one state in a joint layout."""
        if len(states) == 1:
            return states[0]
        first, joint = states[0], Layout.join([part for state in states for part in state.layout.apart()])
        rows = first.rows.new_empty(joint.n_rows, first.rows.shape[1])
        if all((state.layout.by_position.counts == state.layout.by_position.counts[0]).all() for state in states):
            shape = len(joint.by_position.counts), -1, rows.shape[1]
            torch.cat([state.rows.view(shape) for state in states], 1, out=rows.view(shape))
            return ComponentState(rows, joint, first.layer, first.site)
        for p in range(len(joint.by_position.components)):
            blocks = [_by_position(state.rows, state.layout, p) for state in states]
            torch.cat(blocks, 1, out=_by_position(rows, joint, p))
        return ComponentState(rows, joint, first.layer, first.site)

    def apart(self) -> list[ComponentState]:
        """The decompositions of a joint state, each by itself."""
        layouts = self.layout.apart()
        if len(layouts) == 1:
            return [self]
        by_decomposition = np.argsort(self.layout.prompt // len(layouts[0].components), kind="stable")
        rows = self.rows[to_device(self.layout.rows_of(by_decomposition), self.device)]
        parts = rows.split([layout.n_rows for layout in layouts])
        return [
            ComponentState(part, layout, self.layer, self.site) for part, layout in zip(parts, layouts, strict=True)
        ]

    def moved(self) -> ComponentState:
        """The same state as a new object. This one loses its rows, so that nobody who holds it keeps them alive."""
        other = replace(self)
        self.rows = self.rows.new_empty(0, self.rows.shape[1])
        return other

    def mask(self, prompt: int) -> Tensor:
        """True where a component has a row: (N, M), in row order."""
        layout = self.layout
        counts = to_device(layout.counts[layout.segments(prompt)], self.device)
        return torch.arange(len(layout.components[prompt]), device=self.device) < counts[:, None]

    def total(self) -> Tensor:
        """The sum over the components at every segment: (S, D)."""
        counts = self.layout.counts
        if (counts == counts[0]).all():
            return self.rows.view(len(counts), int(counts[0]), self.rows.shape[1]).sum(1)
        return segment_sums(self.rows, self.layout.tensor("starts", self.device)[:-1])

    def missed(self, resid: Tensor, summed: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """‖Σ_m X[n, m] - x[n]‖ at every segment (S,), and ‖x[n]‖ at every position (T,) of ``resid`` (T, D).

        ``summed`` makes of the sum of these components that of all, where the state holds a part of them.
        """
        layout, rows = self.layout, self.rows
        total = self.total() if summed is None else summed(self.total())
        x = resid.to(rows.device)
        if torch.promote_types(x.dtype, rows.dtype) != rows.dtype:
            x = x.to(rows)  # a narrower state cannot be nearer to it than that
        everywhere = np.array_equal(layout.packed, np.arange(len(resid)))
        here = x if everywhere else x[layout.tensor("packed", rows.device)]
        missed, sizes = (torch.linalg.vector_norm(y, dim=1, dtype=rows.dtype) for y in (total - here, x))
        return missed, sizes


def _by_position(rows: Tensor, layout: Layout, prompt: int) -> Tensor:
    """A prompt's rows as (N, M, D), all decompositions side by side. Their components must live everywhere."""
    wide = layout.by_position
    return rows[wide.rows(prompt)].view(-1, len(wide.components[prompt]), rows.shape[1])


def segment_sums(rows: Tensor, starts: Tensor) -> Tensor:
    """Sums of runs of rows: (R, C) and the first row of every run (S,) -> (S, C)."""
    order = torch.arange(len(rows), device=rows.device)
    return nn.functional.embedding_bag(order, rows, starts, mode="sum")  # the fast segmented sum
