"""The division of a sweep's memory: numbers alone, for the sweep and for the planner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CPU_BUDGET, GPU_BUDGET = 5 << 28, 20 << 30  # most bytes of workspace by default
LOUD_ON_CPU, LOUD_ON_GPU = 1 << 28, 4 << 30  # bytes of the loud components of one start, beside the workspace
FEWEST_LOUD = 8


def default_workspace(free: Sequence[int | None], cuda: bool) -> int:
    """Return half of what is free where there is least, up to a bound; a CPU's bound where the system does not tell."""
    known = [size for size in free if size is not None]
    if len(known) < len(free):
        return CPU_BUDGET
    return min(GPU_BUDGET if cuda else CPU_BUDGET, *(size // 2 for size in known))


@dataclass(frozen=True)
class SweepMemory:
    """The memory of one prompt's sweep, in bytes.

    ``starts`` start layers are carried in rows (n, ``width``) of ``item`` bytes per number; ``widest`` is the number of
    neurons of the widest layer.
    """

    n: int
    width: int
    widest: int
    item: int
    starts: int
    cuda: bool

    @property
    def row(self) -> int:
        """One component at all positions."""
        return self.n * self.width * self.item

    @property
    def table(self) -> int:
        """The tables of one layer that the way back needs, per start layer."""
        return 3 * self.n * self.widest * self.item

    @property
    def least(self) -> int:
        """The gates of the fewest rows at two positions: a smaller workspace makes no piece smaller."""
        return 5 * 10 * (FEWEST_LOUD + 3) * self.widest * self.item

    def most_loud(self, at_most: int) -> int:
        """Return the loud components of a start that are carried, whatever memory happens to be free."""
        limit = LOUD_ON_GPU if self.cuda else LOUD_ON_CPU
        return min(at_most, max(FEWEST_LOUD, limit // (4 * self.row)))

    def groups(self, lengths: Sequence[int], most_named: int, at_most: int, workspace: int) -> list[slice]:
        """Return the start layers that are carried together: as many neighbours as fit into the workspace.

        ``lengths`` are the layers ahead of every start, ``most_named`` the components of the start that has most.
        """
        budget = workspace - gates_budget(workspace)
        rows = 4 * self.row * min(self.most_loud(at_most) + 3, most_named + 3)
        groups, first, used = [], 0, 0
        for s, length in enumerate(lengths):
            needed = self.table * max(0, length) + rows
            if s > first and used + needed > budget:
                groups.append(slice(first, s))
                first, used = s, 0
            used += needed
        return [*groups, slice(first, len(lengths))]


def gates_budget(workspace: int) -> int:
    """Return the part of a workspace that the gates held at once may take."""
    return workspace // 5


def positions_at_once(budget: int, rows: int, neurons: int, item: int, held: int = 5) -> int:
    """Return the positions at which the gates of all explicit rows are held at once, ``held`` times."""
    return max(1, budget // (held * rows * neurons * item))


def singles_at_once(budget: int, n: int, neurons: int, item: int, measure: bool) -> int:
    """Return the components that are propagated by themselves at once; ``measure`` compares at least two."""
    return max(1 + measure, budget // (6 * n * neurons * item))
