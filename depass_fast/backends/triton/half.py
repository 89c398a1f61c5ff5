"""Products in float16 with scales: where a layer's weights allow them, and the factors that keep numbers in range.

float16 has three more bits than bfloat16 and a range of 2^-24 to 65,504. Every row is read times a power of two of its
own (:func:`depass_fast.kernels.rows.read_rows`), so that its largest element is below 2^(ROW_TOP + 1). What is left to
bound are the products: an output is at most the norm of the row times the norm of the weight's row.

- V and the gates: sqrt(D) · 2^(ROW_TOP + 1) · ‖w‖. Where the weights' norms are too large the layer takes bfloat16.
- O: sqrt(H·d) · (largest value) · ‖w‖ · 2^-``shift``, since a row of P sums to 1 at most.
- Under a linear rule nothing bounds a share, and the MLP takes bfloat16.
- down adds up in float32. It reads shares w · a · ``factor``, at most 2^15; alpha = 1 / ``factor`` undoes that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...adapters import Adapter, Attention, Mlp
from ...kernels.rows import ROW_TOP
from ...trace.record import MlpTrace, Trace

LARGEST = 65504.0
_LEAST = 2.0**-10  # weights all below this would lose bits: most of them would be subnormal
_SHARES_TOP = 15  # shares of the largest activation are below two to the power of this


@dataclass(frozen=True)
class AttentionRange:
    """``shift``: mixed values are stored that many powers of two smaller."""

    shift: int


@dataclass(frozen=True)
class MlpRange:
    """``factor``: shares are stored times this power of two."""

    factor: float


Ranges = dict[tuple[int, int | None], AttentionRange | MlpRange]  # by layer, and the number of the MLP or None

_norms = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage] (many in one call: no public name)

_known: WeakKeyDictionary[nn.Module, tuple[tuple, dict[tuple[int, int | None], tuple[float, ...]]]] = (
    WeakKeyDictionary()
)


def ranges(adapter: Adapter, trace: Trace, first: int, end: int) -> Ranges:
    """Return the ranges of the layers from ``first`` to ``end`` (excluded) that may compute in float16.

    The device is waited for once. Sizes of weights are kept as long as the model's weights do not change.
    """
    version = trace.source.version
    known = _known.get(adapter.model)
    sizes = known[1] if known is not None and known[0] == version else {}
    parts = [(index, None) for index in range(first, end)]
    parts += [(index, one.part) for index in range(first, end) for one in trace.layers[index].mlps]
    missing = [part for part in parts if part not in sizes]
    measured = [tensor for index, part in missing for tensor in _sizes(adapter, index, part)]
    peaks = _peaks([one for index in range(first, end) for one in trace.layers[index].mlps])
    numbers = _numbers([*measured, *peaks])
    for part, values in zip(missing, _by(numbers[: len(measured)], 4), strict=True):
        sizes[part] = values
    _known[adapter.model] = version, sizes
    found: Ranges = {}
    for part in parts[: end - first]:
        if (one := _attention_range(sizes[part], adapter, part[0])) is not None:
            found[part] = one
    for part, peak in zip(parts[end - first :], numbers[len(measured) :], strict=True):
        if (one := _mlp_range(sizes[part], peak, adapter)) is not None:
            found[part] = one
    return found


def _sizes(adapter: Adapter, index: int, part: int | None) -> Iterator[Tensor]:
    """Yield the largest norm of a row and the largest element, of the weight that reads and of the one that writes."""
    layer = adapter.layer(index)
    weights: Attention | Mlp = layer.attention if part is None else layer.mlps[part]
    read, write = (weights.w_v, weights.w_o) if isinstance(weights, Attention) else (weights.w_gate, weights.w_down)
    for weight in (read, weights.writing(write, write.dtype)):
        yield torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).amax()
        yield torch.linalg.vector_norm(weight, torch.inf).float()


def _peaks(traces: Sequence[MlpTrace]) -> list[Tensor]:
    """The largest activation that each MLP shares out; those of a device without scales of their own at once."""
    peaks: dict[int, Tensor] = {}
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, one in enumerate(traces):
        if not one.act.numel():
            peaks[i] = one.act.new_zeros((), dtype=torch.float32)
            continue
        if one.out_scale is None:
            alike.setdefault((one.act.device, one.act.dtype), []).append(i)
            continue
        scale = one.out_scale if one.positions is None else one.out_scale[one.positions]
        peaks[i] = (torch.linalg.vector_norm(one.act, torch.inf, dim=1).float() * scale.float().abs()).amax()
    for group in alike.values():
        peaks |= zip(group, _norms([traces[i].act for i in group], torch.inf, torch.float32), strict=True)
    return [peaks[i] for i in range(len(traces))]


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    if not tensors:
        return []
    near = tensors[0].device
    return torch.stack([tensor.to(near, torch.float32) for tensor in tensors]).cpu().tolist()


def _by(numbers: Sequence[float], size: int) -> Iterator[tuple[float, ...]]:
    for first in range(0, len(numbers), size):
        yield tuple(numbers[first : first + size])


def _attention_range(sizes: tuple[float, ...], adapter: Adapter, index: int) -> AttentionRange | None:
    norm_v, top_v, norm_o, top_o = sizes
    weights = adapter.attention(index)
    values = _largest_output(norm_v, weights.v.shape[1])
    if not (values <= LARGEST and min(top_v, top_o) >= _LEAST and top_o <= LARGEST):
        return None
    mixed = math.sqrt(weights.o.shape[1]) * values
    return AttentionRange(max(0, math.ceil(math.log2(mixed * norm_o / LARGEST))))


def _mlp_range(sizes: tuple[float, ...], peak: float, adapter: Adapter) -> MlpRange | None:
    norm_gate, top_gate, _, top_down = sizes
    fits = (
        _largest_output(norm_gate, adapter.hidden_size) <= LARGEST
        and min(top_gate, top_down) >= _LEAST
        and top_down <= LARGEST
    )
    if not fits or not math.isfinite(peak):
        return None
    power = _SHARES_TOP - math.ceil(math.log2(peak)) if peak > 0 else 0
    return MlpRange(2.0 ** min(power, 40))


def _largest_output(norm: float, width: int) -> float:
    return math.sqrt(width) * 2.0 ** (ROW_TOP + 1) * norm
