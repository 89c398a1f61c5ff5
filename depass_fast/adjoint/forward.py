"""The mean-field forward: it carries explicitly what is needed to know log Z at every layer (docs/adjoint.md).

Explicit are `rest`, `bias` and the loud components, each as in an exact run. All others, the *crowd*, are known by
their sum, which is what the explicit ones lack to the hidden state, and by their scatter, which one component with
random signs shows. Start layers of one prompt are carried together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..runtime.transfer import to_device
from .approximation import Approximation
from .crowd import Alive, Crowd, allocate_softmax
from .loud import NOBODY, Loud
from .maps import LayerMaps
from .rows import PROBE_ROW, ExplicitRows
from .stack import LayerStack
from .starts import Start, all_alive


@dataclass
class Step:
    """The record of one layer for the way back, at its ``queries``."""

    index: int
    queries: slice
    crowd: Crowd


@dataclass(frozen=True)
class Released:
    """Rows ``x`` (r, N, D) that went back to the crowd; ``owner`` and ``member`` (r,) are in host memory."""

    x: Tensor
    owner: Tensor
    member: Tensor


@dataclass
class Forward:
    """The result of the mean-field forward.

    ``rows`` are those that were explicit to the end, at the read position, ``released`` those that went back to the
    crowd, by the layer that they enter. ``alive[s]`` lists the masks (M, Q) of start s at every layer; None: all are
    alive.
    """

    starts: list[Start]
    steps: list[Step]
    rows: ExplicitRows
    released: dict[int, Released] = field(default_factory=dict)
    alive: list[list[Tensor] | None] = field(default_factory=list)


def mean_field(
    stack: LayerStack,
    starts: Sequence[Start],
    explicit: Sequence[Loud],
    approximation: Approximation,
    budget: int = 1 << 28,
) -> Forward:
    """Carry the explicit rows of ``starts`` (in order) to the end of the stack.

    ``explicit`` holds components of every start that are carried until they are quiet. ``budget`` bounds the gates held
    at once, in bytes.
    """
    way = _WayThere(stack, starts, explicit, approximation, budget)
    for index in range(starts[0].entering, stack.end):
        way.pass_layer(index)
        stack.progress.finish()
    return way.finished()


class _WayThere:
    """A mean-field forward under way; arguments as of :func:`mean_field`."""

    def __init__(
        self,
        stack: LayerStack,
        starts: Sequence[Start],
        explicit: Sequence[Loud],
        approximation: Approximation,
        budget: int,
    ) -> None:
        self._stack, self._starts, self._approximation, self._budget = stack, starts, approximation, budget
        self._whole = all_alive(starts)
        nothing = starts[0].bias.new_zeros(0, stack.n, starts[0].bias.shape[1])
        carried = [
            NOBODY if start.entering >= stack.end else chosen for start, chosen in zip(starts, explicit, strict=True)
        ]
        self._rows = ExplicitRows(nothing, starts, carried, approximation)
        self._alive = Alive()
        self._forward = Forward(list(starts), [], self._rows, alive=self._alive.passed)

    def pass_layer(self, index: int) -> None:
        """Carry the rows through a layer, with the starts that enter it; release those that are quiet from now on."""
        maps, rows = self._stack.maps(index), self._rows
        rows.to(maps.device)
        mid = self._join(index)
        read = rows.x[:, maps.queries] if maps.parallel else None
        if read is not None and maps.fused:
            read = read.clone()  # the rows are used up
        if mid:
            rows.x = rows.x[:, maps.queries]
        else:
            rows.x = maps.add_attention(rows.x)
            _add_constant(rows, maps, "attention")
        counts, temperature = self._alive.crowd_counts(rows, maps, mid), self._approximation.temperature
        crowd = allocate_softmax(rows, read, counts, maps, temperature, self._budget)
        _add_constant(rows, maps, "mlp")
        self._forward.steps.append(Step(index, maps.queries, crowd))
        if index + 1 < self._stack.end and self._approximation.releases:
            self._release(index + 1, temperature)

    def finished(self) -> Forward:
        """Return the result: the rows at the read position, with those of the starts that enter nothing any more."""
        self._rows.x = self._rows.x[:, -1:]
        for start in self._starts:
            if start.entering >= self._stack.end:  # what starts there is what is read
                self._rows.to(start.bias.device)
                self._rows.join()
                self._alive.passed.append(None)
        return self._forward

    def _join(self, index: int) -> bool:
        """Append the rows of the starts that enter a layer; True if they enter behind its attention."""
        mid = False
        for s, start in enumerate(self._starts):
            if start.entering == index:
                self._rows.join()
                self._alive.join(start, self._whole[s], self._rows.x)
                mid = start.mid
        return mid

    def _release(self, index: int, temperature: float) -> None:
        """Give back to the crowd the rows that are quiet from a layer on; the way back needs their state."""
        rows = self._rows
        if not bool(((rows.limits > 0) & (rows.until < index)).any()):
            return
        scale, gamma = self._stack.reading(index, rows.x)
        (response,) = self._stack.responses([index])
        size = ((rows.x if gamma is None else rows.x * gamma).norm(dim=2) * scale).amax(1)
        quiet = (size.cpu() * (response / temperature) < rows.limits) & (rows.until < index)
        if not bool(quiet.any()):
            return
        x, owner = rows.x[to_device(quiet.nonzero()[:, 0], size.device)], rows.owner[quiet]
        self._forward.released[index] = Released(x, owner, rows.member[quiet])
        if self._approximation.scatter:
            signs = to_device(self._approximation.signs(len(x), index).to(x.dtype), x.device)
            probes = rows.places(PROBE_ROW)[to_device(owner, x.device)]  # one per start, in order
            rows.x.index_add_(0, probes, x * signs[:, None, None])
        rows.keep(~quiet)


def _add_constant(rows: ExplicitRows, maps: LayerMaps, module: str) -> None:
    """Add to `bias` the constants of "attention" or "mlp", and apply the stream's own norm behind it."""
    rows.add_to_bias(rows.x, maps.attention_constant if module == "attention" else maps.mlp_constant)
    rows.x = maps.normed(rows.x, module)
    rows.add_to_bias(rows.x, maps.stream_bias(module))
