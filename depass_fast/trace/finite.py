"""The check of a trace for NaN and inf, and the search for their source."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters import Adapter
from .record import LayerTrace, Trace

_norms = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage] (many in one call: no public name)


def check_finite(adapter: Adapter, trace: Trace) -> None:
    """Raise FloatingPointError if a trace holds NaN or inf.

    The message names the first layer where they appear, and the weight that holds them where one does.
    """
    recorded = [_recorded(layer) for layer in trace.layers]
    every = [trace.resid(index) for index in range(len(trace.layers) + 1)]
    passed = _is_finite if trace.resid_final.device.type == "cpu" else _has_finite_sums
    if passed(*every, *(x for layer in recorded for x in layer), trace.normed_final):
        return  # the device was waited for once
    if not _is_finite(trace.resid(0)):
        raise FloatingPointError("embedding: the hidden states entering layer 0 hold NaN or inf.")
    for index, layer in enumerate(recorded):
        if _is_finite(*layer, trace.resid(index + 1)):
            continue
        for name, parameter in adapter.block(index).named_parameters():
            if not _is_finite(parameter):
                name = f"{adapter.name_of(adapter.block(index))}.{name.removesuffix('.weight')}"
                raise FloatingPointError(f"layer {index}: the weights of {name} hold NaN or inf.")
        raise FloatingPointError(
            f"layer {index}: its activations hold NaN or inf on this prompt in {adapter.dtype}. "
            "Load the model in float32 or bfloat16 if they overflow."
        )
    if not _is_finite(trace.normed_final):
        raise FloatingPointError("final norm: its output holds NaN or inf.")


def _recorded(layer: LayerTrace) -> list[Tensor]:
    """The tensors that a layer recorded, without the residual stream."""
    mixing = layer.attention
    looked_at = [] if mixing is None else [mixing.q, mixing.k]
    if mixing is not None and mixing.recurrence is not None and mixing.recurrence.decay is not None:
        looked_at.append(mixing.recurrence.decay)
    if mixing is not None and mixing.keyed is not None and mixing.value_ratio is not None:
        looked_at.append(mixing.value_ratio)
    return [*looked_at, *(x for m in layer.mlps for x in (m.gate, m.act))]


def _has_finite_sums(*tensors: Tensor) -> bool:
    """True if the sums of absolute values are finite: then every element is.

    A GPU takes the sums of many tensors at once, those of half precision in float32. A CPU would copy them to that.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    sums: list[Tensor] = []
    for (_, dtype), group in alike.items():
        sums += _norms(group, 1, torch.promote_types(dtype, torch.float32))
    return bool(torch.stack([total.to(tensors[0].device) for total in sums]).isfinite().all())


def _is_finite(*tensors: Tensor) -> bool:
    """True if no element is NaN or inf. The maximum carries both, and is several times faster than `isfinite`."""
    device = tensors[0].device  # the next layer may lie on another device
    return bool(torch.stack([tensor.abs().amax().to(device) for tensor in tensors]).isfinite().all())
