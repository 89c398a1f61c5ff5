"""The weights of a layer's queries and keys: projections, maybe by way of a latent, and norms of the heads.

The decomposition itself does not need them, as attention is frozen. What explains attention does (DESIGN.md section 9).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .family import Part, Path
from .maps import Latent, Linear, Norm
from .paths import below_or_none


@dataclass(frozen=True)
class HeadNorm:
    """A norm of queries or keys (N, H, d): of every head by itself, or of all heads together (``whole``).

    ``weight`` γ and ``bias`` β are (H, d), or (1, d) for all heads, or None.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool
    whole: bool

    def scale(self, x: Tensor) -> Tensor:
        """The factor s of ``x`` (N, H, d) -> (N, H, 1), or (N, 1, 1); in float32 or wider."""
        x = self.centre(x.to(torch.promote_types(x.dtype, torch.float32)))
        return torch.rsqrt(x.square().mean(self._axes, keepdim=True) + self.eps)

    def centre(self, x: Tensor) -> Tensor:
        """Take the mean away, where the norm does; this is its own transpose."""
        return x - x.mean(self._axes, keepdim=True) if self.centred else x

    @property
    def _axes(self) -> tuple[int, ...]:
        return (-2, -1) if self.whole else (-1,)


@dataclass(frozen=True)
class Projected:
    """The projections to the queries, or to the keys, of all heads: ``own`` maps D to H·d.

    ``shared`` maps D to what every head has behind its own part (keys of multi-head latent attention), else None.
    """

    own: Linear | Latent
    shared: Linear | None
    norm: HeadNorm | None


@dataclass(frozen=True)
class QueryKey:
    """The way from the residual stream to queries and keys, in front of the rotary embedding.

    ``norm_is_last``: the norms of the heads are behind the rotary embedding.
    """

    q: Projected
    k: Projected
    norm_is_last: bool


def query_key(adapter: Adapter, index: int) -> QueryKey:
    """The weights of layer ``index``. Raises ValueError if the model keeps them elsewhere than its family."""
    block, family = adapter.block(index), adapter.kind(index)
    if not adapter.has_attention(index) or family.mixer is not None or family.keyed is not None:
        raise ValueError(f"model: layer {index} has no softmax attention over positions alone; take another layer.")
    attention = adapter.attention(index)
    heads, kv = attention.n_heads, attention.n_kv_heads
    q: Linear | Latent = _linear(adapter, index, family.q_proj, family.q_part)
    if below_or_none(block, family.q_down) is not None:
        q = Latent(_linear(adapter, index, family.q_down), _latent_norm(adapter, index, family.q_latent_norm), q)
    shared: Linear | None = None
    if isinstance(attention.v, Latent) and family.k_up_part is not None:
        down = replace(attention.v.down, part=family.v_part)
        k: Linear | Latent = Latent(down, attention.v.norm, replace(attention.v.up, part=family.k_up_part))
        shared = replace(attention.v.down, part=family.k_shared_part)
    else:
        k = _linear(adapter, index, family.k_proj, family.k_part)
    q_norm, k_norm = (below_or_none(block, path) for path in (family.q_norm, family.k_norm))
    return QueryKey(
        Projected(q, None, _head_norm(adapter, q_norm, heads, attention.key_dim)),
        Projected(k, shared, _head_norm(adapter, k_norm, kv, attention.key_dim)),
        family.qk_norm_last,
    )


def sinks(adapter: Adapter, index: int) -> Tensor | None:
    """The logits of nothing (H,) that queries of layer ``index`` have beside those of the keys, or None."""
    if not adapter.has_sinks:
        return None
    attention = adapter.module(index, "attention")
    if not hasattr(attention, "sinks"):
        raise ValueError(
            f"model: layer {index} keeps no sinks where its family does; its attention cannot be explained."
        )
    return attention.sinks  # type: ignore[return-value]  # None in a layer without


def projections(adapter: Adapter, index: int) -> dict[str, tuple[nn.Module, Part | None]]:
    """The modules whose outputs become queries (`q`) and keys (`k`, `shared`), each with its part of them."""
    family, block = adapter.family, adapter.block(index)
    found = {"q": (below_or_none(block, family.q_proj), family.q_part)}
    if family.k_up_part is None:
        found["k"] = below_or_none(block, family.k_proj), family.k_part
    else:
        found["k"] = below_or_none(block, family.v_up), family.k_up_part
        found["shared"] = below_or_none(block, family.v_proj), family.k_shared_part
    return found


def head_norms(adapter: Adapter, index: int) -> list[nn.Module]:
    """The modules that are norms of queries and keys."""
    if not adapter.has_attention(index):
        return []
    paths = adapter.kind(index).q_norm, adapter.kind(index).k_norm
    found = [below_or_none(adapter.block(index), path) for path in paths]
    return [norm for norm in found if norm is not None]


def query_key_norms(adapter: Adapter) -> Iterator[tuple[nn.Module, Norm]]:
    """Every module that is a norm of queries, of keys or of the latent of queries, and what it computes."""
    for index in range(adapter.n_layers):
        latent = below_or_none(adapter.block(index), adapter.family.q_latent_norm)
        if latent is not None:
            yield latent, adapter.made_norm(latent)
        for module in head_norms(adapter, index):
            for one in getattr(module, "norms", [module]):
                yield one, replace(adapter.made_norm(one), centred=_is_centred(one))


def _linear(adapter: Adapter, index: int, path: Path | None, part: Part | None = None) -> Linear:
    module = below_or_none(adapter.block(index), path)
    if module is None:
        assert path is not None
        name = path if isinstance(path, str) else path[0]
        raise ValueError(
            f"model: layer {index} of {type(adapter.model).__name__} has no {name}, where its family keeps what makes "
            "queries and keys; its attention cannot be explained."
        )
    return Linear(module, part)


def _latent_norm(adapter: Adapter, index: int, path: Path | None) -> Norm:
    return adapter.made_norm(below_or_none(adapter.block(index), path))


def _head_norm(adapter: Adapter, module: Any, heads: int, width: int) -> HeadNorm | None:
    """A norm of queries or keys from its module; one that is a list has a norm for every head (StableLM)."""
    if module is None:
        return None
    each = list(getattr(module, "norms", [module]))
    made = [adapter.made_norm(one) for one in each]
    whole = (
        made[0].weight is not None and made[0].weight.dim() == 1 and made[0].weight.numel() == heads * width != width
    )
    weight, bias = (_by_head([getattr(one, name) for one in made], width) for name in ("weight", "bias"))
    return HeadNorm(weight, bias, made[0].eps, _is_centred(each[0]), whole)


def _is_centred(norm: nn.Module) -> bool:
    return "LayerNorm" in type(norm).__name__


def _by_head(each: list[Tensor | None], width: int) -> Tensor | None:
    held = [one.reshape(-1, width) for one in each if one is not None]
    return torch.cat(held) if held else None
