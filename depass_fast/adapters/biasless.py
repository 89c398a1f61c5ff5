"""A model whose additive constants no component carries: a quirk of the published code (DESIGN.md section 6)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from .adapter import Adapter
from .maps import Linear, Norm
from .weights import Attention, Branch, Mlp

AnyBranch = TypeVar("AnyBranch", bound=Branch)


def without_biases(adapter: Adapter) -> Adapter:
    """The same model with layers, final norm and unembedding that have no biases: for the propagation only.

    Its forward pass has them still, so that a trace is taken with ``adapter`` itself.
    """
    return _Biasless(adapter.model, adapter.family)


@dataclass(frozen=True)
class _Biasless(Adapter):
    @property
    def unembedding_bias(self) -> None:
        return None

    def final_norm(self) -> Norm | None:
        return _biasless_norm(super().final_norm())

    def attention(self, index: int) -> Attention:
        weights = _biasless_norms(super().attention(index))
        v = _biasless_linear(weights.v) if isinstance(weights.v, Linear) else weights.v  # a latent has none
        conv = None if weights.conv is None else _biasless_linear(weights.conv)
        return replace(weights, v=v, o=_biasless_linear(weights.o), conv=conv)

    def mlps(self, index: int) -> tuple[Mlp, ...]:
        return tuple(_biasless_mlp(_biasless_norms(mlp)) for mlp in super().mlps(index))


def _biasless_mlp(mlp: Mlp) -> Mlp:
    up = None if mlp.up is None else _biasless_linear(mlp.up)
    return replace(mlp, gate=_biasless_linear(mlp.gate), up=up, down=_biasless_linear(mlp.down))


def _biasless_norms(branch: AnyBranch) -> AnyBranch:
    norm, output, stream = (_biasless_norm(norm) for norm in (branch.norm, branch.output, branch.stream))
    front = branch.front if branch.front is None else replace(branch.front, norm=replace(branch.front.norm, bias=None))
    return replace(branch, norm=norm, output=output, stream=stream, front=front)


def _biasless_norm(norm: Norm | None) -> Norm | None:
    return None if norm is None else replace(norm, bias=None)


def _biasless_linear(linear: Linear) -> Linear:
    return replace(linear, keeps_bias=False)
