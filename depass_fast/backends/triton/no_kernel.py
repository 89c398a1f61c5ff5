"""Attention that the fused backend leaves to torch."""

from __future__ import annotations

from ...trace.record import AttentionTrace

_WIDEST_HEAD = 512  # bytes, beyond which a tile of keys and values does not fit into registers


def without_kernel(trace: AttentionTrace, head_bytes: int) -> str | None:
    """Return the part of a layer's attention that no kernel is for; None if there is none."""
    if trace.keyed is not None:
        return "keys that are values"
    if trace.recurrence is not None or trace.out_ratio is not None:
        return "recurrences, and heads with a gate or a norm behind them"
    if trace.chosen_keys is not None:
        return "keys that an indexer selects"
    if trace.head_scales is not None or trace.source is not None:
        return "norms of values, and values of an earlier layer"
    if trace.chunked:
        return "chunks of positions"
    if head_bytes > _WIDEST_HEAD:
        return f"heads of {head_bytes} bytes"
    return None if trace.value_ratio is None else "values that the model clamps"
