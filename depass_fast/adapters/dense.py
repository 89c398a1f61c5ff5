"""The MLP of a layer without experts, and what it lacks for the rules that need its up projection and activation."""

from __future__ import annotations

from typing import Any

from torch import nn

from .activation import Activation
from .adapted import adapted
from .chained import Chained
from .family import Family, Path
from .maps import Linear
from .paths import below, below_or_none
from .stored import unreadable
from .weights import Mlp


def dense_mlp(block: nn.Module, family: Family, branch: dict[str, Any]) -> Mlp:
    """The MLP of a layer; ``up`` and ``activation`` are None where they are not found."""
    up, act_fn = below_or_none(block, family.up_proj), below_or_none(block, family.act_fn) or family.curve
    adapter, behind = (below_or_none(block, path) for path in (family.gate_adapter, family.down_behind))
    down = Linear(below(block, family.down_proj))
    return Mlp(
        **branch,
        gate=adapted(Linear(below(block, family.gate_proj), family.gate_part), adapter),
        up=None if up is None else adapted(Linear(up, family.up_part), adapter),
        down=down if behind is None else Chained(behind, inner=down),
        activation=family.activation if act_fn is None else Activation(act_fn, sparsity=family.sparsity),
    )


def unusable_part(block: nn.Module, family: Family) -> tuple[Path, str] | None:
    """The path of an up projection or activation that a linear rule cannot use, and the reason; None if it can."""
    if family.up_proj is not None:
        up = below_or_none(block, family.up_proj)
        problem = "the model keeps nothing there." if up is None else unreadable(up)
        if problem is not None:
            return family.up_proj, problem
    if family.act_fn is None or below_or_none(block, family.act_fn) is not None:
        return None
    return family.act_fn, "the model keeps nothing there."
