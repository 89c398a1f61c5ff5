"""How a sweep divides its memory: numbers alone, for the sweep and for the planner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CPU_BUDGET, GPU_BUDGET = 5 << 28, 20 << 30  # bytes of workspace, unless told otherwise or half of what is free is less
LOUD_ON_CPU, LOUD_ON_GPU = 1 << 28, 4 << 30  # bytes of the loud components of all starts; never the workspace's affair
FEWEST_LOUD = 8


def default_workspace(free: Sequence[int | None], cuda: bool) -> int:
    """Half of what is free where there is least, up to a bound; that of a CPU where the system does not tell."""
    if None in free:
        return CPU_BUDGET
    return min(GPU_BUDGET if cuda else CPU_BUDGET, *(size // 2 for size in free))


@dataclass(frozen=True)
class SweepMemory:
    """One prompt's sweep: ``starts`` start layers, rows (n, ``width``) of ``item`` bytes per number.

    ``widest`` are the neurons of the widest layer. Everything is in bytes.
    """

    n: int
    width: int
    widest: int
    item: int
    starts: int
    cuda: bool

    @property
    def row(self) -> int:
        return self.n * self.width * self.item

    @property
    def table(self) -> int:
        """What the way back needs of one layer, per start layer."""
        return 3 * self.n * self.widest * self.item

    @property
    def least(self) -> int:
        """Gates of the fewest rows at two positions: a workspace of less than that makes no piece smaller."""
        return 5 * 10 * (FEWEST_LOUD + 3) * self.widest * self.item

    def most_loud(self, at_most: int) -> int:
        """Loud components of a start that are carried: scores do not depend on what memory happens to be free."""
        room = LOUD_ON_GPU if self.cuda else LOUD_ON_CPU
        return min(at_most, max(FEWEST_LOUD, room // (4 * self.row * self.starts)))

    def groups(self, lengths: Sequence[int], most_named: int, at_most: int, workspace: int) -> list[slice]:
        """Start layers that are carried together, of which each has so many layers ahead: as many as there is room for.

        ``most_named`` is the number of components of the start that has most.
        """
        budget = workspace - gates_room(workspace)
        rows = 4 * self.row * min(self.most_loud(at_most) + 3, most_named + 3)
        groups, first, used = [], 0, 0
        for s, length in enumerate(lengths):
            needed = self.table * max(0, length) + rows
            if s > first and used + needed > budget:
                groups.append(slice(first, s))
                first, used = s, 0
            used += needed
        return [*groups, slice(first, len(lengths))]


def gates_room(workspace: int) -> int:
    """What of a workspace the gates that are held at once may take."""
    return workspace // 5


def positions_at_once(room: int, rows: int, neurons: int, item: int) -> int:
    """At how many positions the gates of all explicit rows are held at once."""
    return max(1, room // (5 * rows * neurons * item))


def journeys_at_once(room: int, n: int, neurons: int, item: int, measure: bool) -> int:
    """How many components are propagated by themselves at once; ``measure`` compares at least two."""
    return max(1 + measure, room // (6 * n * neurons * item))
