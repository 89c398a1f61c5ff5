"""The ranks of a process group, among which the components of a prompt are dealt, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ref

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Made = TypeVar("Made")

_EXPECTED = "a torch.distributed DeviceMesh of one dimension, or a ProcessGroup"


class Ranks:
    """This process and the others of its group, ``size`` in all, of which it is number ``rank``.

    All of them do the same steps in the same order: each waits in a reduction for the others. Tensors are reduced on
    ``device``, the one that computes, and in place where they lie there.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._group, self.device = ref(group), device  # a gloo group that outlives its destruction aborts at the exit
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    @staticmethod
    def of(shard: Any, device: torch.device) -> Ranks:
        """Return the ranks of the option ``shard``, for a model on ``device``.

        Raises:
            TypeError: it is no mesh and no group.
            ValueError: a mesh of several dimensions; no process group, or one that this process is not in; a group
                that exchanges on GPUs alone, for a model on a CPU.
        """
        group = group_of(shard)
        if dist.get_backend(group) == "nccl" and device.type == "cpu":
            raise ValueError("shard: its nccl group exchanges on GPUs, and the model is on a CPU; take a gloo group.")
        return Ranks(group, device)

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum over the ranks, where ``part`` is."""
        return self._reduced(part, dist.ReduceOp.SUM)

    def max(self, part: Tensor) -> Tensor:
        """Return the largest of the ranks, number by number. It may pass over NaN."""
        return self._reduced(part, dist.ReduceOp.MAX)

    def min(self, part: Tensor) -> Tensor:
        """Return the smallest of the ranks, number by number. It may pass over NaN."""
        return self._reduced(part, dist.ReduceOp.MIN)

    def any(self, here: bool) -> bool:
        """True if it is true on any rank."""
        return bool(self.max(torch.tensor(int(here), device=self.device)))

    def deal(self, extras: int, named: int) -> np.ndarray:
        """Return the places of this rank's components among ``extras`` and ``named`` ones, in order.

        The first rank has the extras. Named ones go round: of tokens, which are born one after the other, every rank
        has as many early ones as any other.
        """
        first = np.arange(extras if self.rank == 0 else 0)
        return np.concatenate([first, extras + np.arange(self.rank, named, self.size)])

    def together(self, make: Callable[[], Made]) -> Made:
        """Return what ``make`` makes, once all ranks have made it. Where it fits on one not, all raise MemoryError."""
        made, failed = None, None
        try:
            made = make()
        except MemoryError as error:
            failed = error
        short = int(self.max(torch.tensor(-1 if failed is None else self.rank, device=self.device)))
        if failed is not None:
            raise failed
        if short >= 0:
            raise MemoryError(f"shard: it does not fit on rank {short}, whose own message says what would.")
        return made  # pyright: ignore[reportReturnType]  # it is there, or make has raised

    def check_alike(self, marks: Mapping[str, Any]) -> None:
        """Compare ``marks``, by their repr, between the ranks. All of them raise where one differs.

        Raises:
            ValueError: naming the marks that differ.
        """
        digests = [sha256(repr(mark).encode()).digest()[:7] for mark in marks.values()]
        here = torch.tensor([int.from_bytes(digest, "big") for digest in digests], device=self.device)
        differs = (self.max(here.clone()) != self.min(here.clone())).tolist()
        if any(differs):
            named = {name: mark for (name, mark), wrong in zip(marks.items(), differs, strict=True) if wrong}
            said = "; ".join(f"{name} is here {_shown(mark)}" for name, mark in named.items())
            raise ValueError(
                f"shard: the ranks do not ask for the same. {', '.join(named)} differ{'s' * (len(named) == 1)} between "
                f"them. On rank {self.rank} of {self.size}, {said}. Every rank makes the same calls."
            )

    def _reduced(self, part: Tensor, operation: Any) -> Tensor:
        group, part_here = self._group(), part.to(self.device).contiguous()
        assert group is not None, "the process group was destroyed"  # None would be all processes
        dist.all_reduce(part_here, operation, group=group)
        return part_here.to(part.device)


def group_of(shard: Any) -> ProcessGroup:
    """Return the process group of the option ``shard``. Errors as of :meth:`Ranks.of`."""
    if not dist.is_available():
        raise ValueError("shard: this build of torch has no torch.distributed.")
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(shard, DeviceMesh | dist.ProcessGroup):
        raise TypeError(f"shard: expected {_EXPECTED}, got {shard!r}.")
    if not dist.is_initialized():
        raise ValueError("shard: its process group is not initialised, or no longer; init_process_group comes first.")
    group = _group_of_mesh(shard) if isinstance(shard, DeviceMesh) else shard
    try:
        rank = dist.get_rank(group)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"shard: the process group exists no longer ({error}).") from error
    if rank < 0:
        raise ValueError("shard: this process is none of its ranks, so that no components are dealt to it.")
    return group


def _group_of_mesh(mesh: DeviceMesh) -> ProcessGroup:
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        one = f"one of them, mesh[{names[0]!r}]" if names else "a mesh of one"
        raise ValueError(f"shard: a mesh of {mesh.ndim} dimensions; components are dealt along one. Give {one}.")
    if mesh.get_coordinate() is None:
        raise ValueError("shard: this process is not in the mesh, so that no components are dealt to it.")
    return mesh.get_group()


def _shown(mark: Any) -> str:
    """Return a mark as text, cut where it is long."""
    text = repr(mark)
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-90:]}"
