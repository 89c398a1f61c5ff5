"""The output projections of a mixture of attention heads, as one projection of all heads of all experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .maps import Linear
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
