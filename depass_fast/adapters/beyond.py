"""The parts of layers beyond plain ones, by name: what some computations do not know, and their errors say.

A plain layer is softmax attention with values of its own, nothing between its heads and the output projection, and then
an MLP. `docs/limits.md` lists the same names, and the families that have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .family import Family

# beside one norm in front of attention and one in front of the MLP: what graphs and a report's positions do not know
BEYOND_ONE_NORM: dict[str, Callable[[Family], object]] = {
    "norms of heads' values": lambda kind: kind.v_head_norm,
    "values of an earlier layer": lambda kind: kind.source is not None,
    "gates of the token's embedding": lambda kind: kind.input_gate,
    "experts beside an MLP": lambda kind: kind.experts and kind.experts.beside,
    "experts ahead of their layer": lambda kind: kind.has_experts_ahead,
    "factors of the stream": lambda kind: kind.layer_factor or kind.attention_mix or kind.mlp_mix,
    "convolutions behind branches": lambda kind: kind.attention_conv or kind.mlp_conv,
    "what branches read of the position before": lambda kind: kind.attention_shift or kind.mlp_shift,
    "several residual streams": lambda kind: kind.streams,
}
# what the adjoint sweep under the softmax, attention's own book and the published interface do not know either; a
# gate or norm behind a recurrence is a part of that
BEYOND_PLAIN: dict[str, Callable[[Family], object]] = {
    "recurrences": lambda kind: kind.mixer and not kind.mixer.attends,
    "attention that is no single softmax": lambda kind: _attends(kind) and not _reads_back(kind),
    "values that come from several positions": lambda kind: _attends(kind) and _reads_back(kind),
    "values that are keys": lambda kind: kind.keyed,
    "keys selected by group of heads": lambda kind: kind.key_block is not None,
    "gates in front of the projection of heads": lambda kind: _scales_by(kind) not in (None, ()),
    "norms in front of the projection of heads": lambda kind: _scales_by(kind) == (),
    "gates of a norm's output": lambda kind: kind.norm_gate,
    "gates of an MLP's output": lambda kind: kind.mlp_scale,
    "factors of the sum of stream and branch": lambda kind: (kind.attention_keeps, kind.mlp_keeps) != (1.0, 1.0),
    "layers without attention": lambda kind: not kind.attention,
    "layers without an MLP": lambda kind: not kind.mlp,
    **BEYOND_ONE_NORM,
}
ROUTED_HEADS = "heads that a router chooses"  # the adjoint sweep knows these


def named(kinds: Sequence[Family], parts: dict[str, Callable[[Family], object]]) -> list[str]:
    """Return the names of those ``parts`` that any of the ``kinds`` has."""
    return [name for name, has in parts.items() if any(map(has, kinds))]


def beyond_plain(kinds: Sequence[Family]) -> list[str]:
    """Return the names of all that ``kinds`` have beyond plain layers."""
    return named(kinds, {**BEYOND_PLAIN, ROUTED_HEADS: lambda kind: kind.head_experts})


def _attends(kind: Family) -> bool:
    """True if it is a softmax that the engine computes itself."""
    return kind.mixer is not None and kind.mixer.attends


def _reads_back(kind: Family) -> bool:
    """True if values pass a convolution along the positions."""
    return kind.mixer is not None and (kind.mixer.conv is not None or kind.mixer.taps is not None)


def _scales_by(kind: Family) -> tuple[str, ...] | None:
    """Return what gives the factors between a softmax and the output projection; empty: a norm. None without any."""
    scale = kind.head_scale if kind.mixer is None or kind.mixer.attends else None
    return None if scale is None else scale.projections
