"""The processes of one sweep: which prompts are whose. They need no contact: prompts are dealt by a hash of their ids.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, and Slurm's srun SLURM_PROCID, SLURM_STEP_NUM_TASKS and
SLURM_LOCALID.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# SLURM_NTASKS is also set where a script runs without srun, once and alone
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


@dataclass(frozen=True)
class Share:
    """The share of process ``rank`` of ``world``; ``local_rank`` of ``local_world`` on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @staticmethod
    def of_environment(environment: Mapping[str, str] | None = None) -> Share:
        """Return the share that torchrun or srun gives this process; all of it where neither started it.

        Raises:
            ValueError: a variable is missing, no number, or out of range.
        """
        held = os.environ if environment is None else environment
        names = next((names for names in (_TORCHRUN, _SLURM) if names[1] in held), None)
        if names is None:
            return Share()
        rank, world = _number(held, names[0]), _number(held, names[1])
        local = _number(held, names[2]) if names[2] in held else rank
        beside = held.get(names[3], "").partition("(")[0].partition(",")[0]
        local_world = int(beside) if beside.isdecimal() else max(1, local + 1)
        if not 0 <= rank < world:
            raise ValueError(f"{names[0]}: {rank} is out of range; {names[1]} is {world}.")
        return Share(rank, world, local, local_world)

    def owns(self, id: str) -> bool:
        """True if a prompt is this process's. It does not depend on the other prompts or on their order."""
        if self.world == 1:
            return True
        digest = hashlib.blake2b(id.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.world == self.rank


def _number(held: Mapping[str, str], name: str) -> int:
    text = held.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"{name}: expected a number beside the other variables of its kind, got {text!r}.")
    return int(text)
