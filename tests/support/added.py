"""The outputs that an ordinary forward pass adds to the residual stream, by hooks on the model's own modules."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor

from depass_fast import DePass


def added_by(dp: DePass, ids: Tensor, layer: int) -> dict[str, Tensor]:
    """Return what "attention" and "mlp" of a layer add (N, D), as far as it has them, behind norms of the stream."""
    adapter, seen = dp.adapter, {}
    sparse, sides, added = adapter.is_mixture(layer), adapter.sides(layer), {}
    with ExitStack() as undo:

        def note(module: Any, key: str) -> None:
            def hook(module: Any, args: tuple, output: Any) -> None:
                output = output[0] if isinstance(output, tuple) else output
                seen[key] = args[0].flatten(0, -2).clone(), output.flatten(0, -2).clone()  # Falcon adds in place

            undo.callback(module.register_forward_hook(hook).remove)

        ends = {"attention": "o_proj", "mlp": "mlp" if sparse else "down_proj"}
        ends = {kind: last for kind, last in ends.items() if adapter.module(layer, last) is not None}
        for kind, last in ends.items():
            note(adapter.module(layer, f"{kind}_output_norm") or adapter.module(layer, last), kind)
            if adapter.module(layer, f"{kind}_stream_norm") is not None:
                note(adapter.module(layer, f"{kind}_stream_norm"), f"{kind} stream")
        for name, expert in adapter.block(layer).named_children():
            if sparse and name == "shared_mlp":
                note(expert, "shared")
        if sides is not None:
            note(sides[0].o.module, "beside")
        dp.model(ids[None])
    for kind in ends:
        branch = adapter.attention(layer) if kind == "attention" else adapter.mlps(layer)[0]
        total = seen[kind][1] + (seen["shared"][1] if "shared" in seen and kind == "mlp" else 0.0)
        added[kind] = total * branch.factor
        if kind == "attention" and sides is not None:  # two outputs, each with its factor
            added[kind] = seen["beside"][1] * sides[0].factor + seen[kind][1] * sides[1].factor
        if f"{kind} stream" in seen:
            norm = adapter.module(layer, f"{kind}_stream_norm")
            added[kind] = _behind_stream(norm, *seen[f"{kind} stream"], added[kind])
    return added


def _behind_stream(norm: Any, total: Tensor, normed: Tensor, added: Tensor) -> Tensor:
    """Return what a branch adds, behind the norm of the sum: without what was in the stream before."""
    before = total - added
    std = (total.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    return normed - (before - before.mean(-1, keepdim=True)) / std * norm.weight
