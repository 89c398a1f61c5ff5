"""A mixture of attention heads: the output projections of all experts as one, and the decisions of the router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from .family import HeadExperts
from .maps import Linear
from .paths import below
from .stored import stored_weight


@dataclass(frozen=True)
class ExpertOutputs(Linear):
    """The output projections of all experts: ``weight`` (D, Hkv·E·d), with the one ``bias`` (D,) that they share.

    The module holds (E, D, Hkv·d). Heads that share one of the ``kv`` KV heads lie side by side: head h is that of
    expert h mod E on KV head h // E.
    """

    kv: int = 1
    shared_bias: Tensor | None = None

    @cached_property
    def shape(self) -> tuple[int, int]:
        experts, out, size = stored_weight(self.module).shape
        return out, experts * size

    @cached_property
    def weight(self) -> Tensor:
        stack = stored_weight(self.module).unflatten(2, (self.kv, -1))  # (E, D, Hkv, d)
        return stack.permute(1, 2, 0, 3).flatten(1)

    @cached_property
    def bias(self) -> Tensor | None:
        return self.shared_bias if self.keeps_bias else None

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    @property
    def is_own(self) -> bool:
        return False  # its weight is made when it is read


def outputs_of_experts(block: nn.Module, declared: HeadExperts, o: Linear, kv: int) -> ExpertOutputs:
    """The output projection of all heads, ``o`` having the module that holds those of all experts."""
    return ExpertOutputs(o.module, kv=kv, shared_bias=below(block, declared.bias))


def watch_heads(block: nn.Module, declared: HeadExperts, note: Callable[[Tensor, Tensor], None]) -> Callable[[], None]:
    """Have ``note`` called with weights and indices (T, K) of the chosen experts. Returns the function to undo it."""

    def returned(module: nn.Module, args: tuple, output: Any) -> None:
        note(*declared.decide(output))

    return below(block, declared.router).register_forward_hook(returned).remove
