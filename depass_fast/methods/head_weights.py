"""The weights by which a head mixes positions: softmax probabilities, or the matrix of a recurrence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import Adapter
from ..runtime.memory import available, readable
from ..runtime.precision import full_precision
from ..trace.attention import span_probabilities
from ..trace.mixing import FrozenMixing
from ..trace.record import AttentionTrace, Trace

_QUERIES = 256  # whose probabilities are held at once, of all heads


def check_mixes(adapter: Adapter, layer: int) -> None:
    """Raise ValueError if ``layer`` does not mix positions, or by more than a matrix for each head."""
    if not adapter.has_attention(layer):
        raise ValueError(f"layer: layer {layer} has no heads: it does not mix positions.")
    if adapter.kind(layer).keyed is not None:
        raise ValueError(
            "layer: the values of this model are its keys, which are turned by position and stand for windows, too; "
            "no matrix of positions says what its heads do."
        )


def head_weights(adapter: Adapter, trace: Trace, prompt: int, layer: int, heads: Sequence[int]) -> Tensor:
    """Return the weights (H', N, N) of some heads on one prompt, in float32 or wider. Raises MemoryError."""
    n, frozen, weights = trace.length(prompt), trace.layers[layer].attention, adapter.attention(layer)
    dtype = torch.promote_types(frozen.q.dtype, torch.float32)
    _check_memory(n, len(heads), weights.n_heads, frozen.q.device, dtype)
    looking = frozen if frozen.recurrence is None or frozen.recurrence.decay is None else frozen.beside
    # the first heads have a softmax, and the others a recurrence
    count = weights.n_heads if looking is frozen else 0 if looking is None else looking.q.shape[1]
    out = torch.zeros(len(heads), n, n, dtype=dtype, device=frozen.q.device)
    with full_precision():
        if looking is not None and any(head < count for head in heads):
            _look(looking, trace.span(prompt), [(i, head) for i, head in enumerate(heads) if head < count], out)
        for i, head in enumerate(heads):
            if head >= count:
                mixing = FrozenMixing(weights, frozen, trace.span(prompt), dtype)
                out[i] = mixing.matrix(slice(head - count, head - count + 1))[0]
    return out


def _look(trace: AttentionTrace, span: slice, heads: Sequence[tuple[int, int]], out: Tensor) -> None:
    """Write the probabilities of ``heads``, (row of ``out``, head) each, some queries at a time."""
    rows, chosen = (torch.tensor(one, device=out.device) for one in zip(*heads, strict=True))
    for first in range(0, out.shape[1], _QUERIES):
        queries = slice(first, min(first + _QUERIES, out.shape[1]))
        out[rows, queries] = span_probabilities(trace, span, queries, out.dtype)[chosen]


def _check_memory(n: int, heads: int, every: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raise MemoryError if the weights do not fit."""
    need = (heads * n + 3 * every * min(n, _QUERIES)) * n * dtype.itemsize
    free = available(device)
    if free is not None and need > free:
        raise MemoryError(
            f"head_weights: {heads} heads of {n} positions need {readable(need)}, and {readable(free)} are available. "
            "Ask for fewer heads."
        )
