"""The outputs that an ordinary forward pass adds to the residual stream, by hooks on the model's own modules."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from depass_fast import DePass
from depass_fast.adapters import Adapter, Branch, Streams
from depass_fast.adapters.paths import below_or_none
from depass_fast.adapters.shared_block import SharedBlock

_HYPER = ("attn_hc", "ffn_hc", "attn_hyper_connection", "mlp_hyper_connection")  # of attention and of the MLP


def added_by(dp: DePass, ids: Tensor, layer: int) -> dict[str, Tensor]:
    """Return what "attention" and "mlp" of a layer add (N, D), as far as it has them, behind norms of the stream."""
    adapter, seen = dp.adapter, {}
    sparse, sides, added = adapter.is_mixture(layer), adapter.sides(layer), {}
    with ExitStack() as undo:

        def note(module: Any, key: str) -> None:
            if module is None:
                return

            def hook(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
                output = output[2 if key.endswith("hyper_connection") else 0] if isinstance(output, tuple) else output
                given = args[0] if args else kwargs["hidden_states"]
                seen[key] = given.flatten(0, -2).clone(), output.flatten(0, -2).clone()  # Falcon adds in place

            undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

        ends = _ends(adapter, layer)
        for kind, last in ends.items():
            note(adapter.module(layer, f"{kind}_output_norm") or adapter.module(layer, last), kind)
            note(adapter.module(layer, f"{kind}_stream_norm"), f"{kind} stream")
            note(adapter.module(layer, f"{kind}_conv"), f"{kind} spread")
        beside = "mlp" if adapter.kind(layer).has_experts_ahead else "shared_mlp"
        note(getattr(adapter.block(layer), beside, None) if sparse else None, "shared")
        note(None if sides is None else sides[0].o.module, "beside")
        note(adapter.module(layer, "mlp") if adapter.kind(layer).mlp_scale is not None else None, "scaled")
        gate = adapter.kind(layer).input_gate
        note(None if gate is None else adapter.block(layer).get_submodule(gate.output_norm), "embed")
        for name in ("altup.correction_coefs", *_HYPER) if adapter.family.streams is not None else ():
            note(below_or_none(adapter.block(layer), name), name)
        dp.model(ids[None])
    for kind in ends:
        branch = adapter.attention(layer) if kind == "attention" else adapter.mlps(layer)[0]
        total = seen[kind][1] + (seen["shared"][1] if "shared" in seen and kind == "mlp" else 0.0)
        total = seen["scaled"][1] if "scaled" in seen and kind == "mlp" else total
        added[kind] = _spread(seen, kind, _mixed(adapter, layer, kind, total * branch.factor))
        if (streams := adapter.kind(layer).streams) is not None:
            added[kind] = _on_streams(streams, kind, added[kind], seen, adapter.stream_width)
            continue
        if kind == "attention" and sides is not None:  # two outputs, each with its factor
            added[kind] = seen["beside"][1] * sides[0].factor + seen[kind][1] * sides[1].factor
        if kind == "mlp":
            added[kind] = _behind_layer(adapter, layer, seen, added[kind])
        added[kind] = _behind_stream(branch, seen.get(f"{kind} stream"), added[kind] * branch.keeps)
    return added


def _ends(adapter: Any, layer: int) -> dict[str, str]:
    """Return the part whose output each branch of a layer adds."""
    whole = adapter.kind(layer).head_experts is not None  # whose projections take positions in another order
    behind = adapter.has_mlp(layer) and adapter.module(layer, "down_behind") is not None
    mlp = "mlp" if adapter.is_mixture(layer) else "down_behind" if behind else "down_proj"
    ends = {"attention": "attention" if whole else "o_proj", "mlp": mlp}
    return {kind: last for kind, last in ends.items() if adapter.module(layer, last) is not None}


def _mixed(adapter: Any, layer: int, kind: str, added: Tensor) -> Tensor:
    """Return what a branch adds behind its factors by channel and its constant, where it has them."""
    mix = getattr(adapter.kind(layer), f"{kind}_mix")
    if mix is None:
        return added
    _, factor, constant = mix(adapter.block(layer))
    return added * factor + (0.0 if constant is None else constant)


def _spread(seen: dict, kind: str, added: Tensor) -> Tensor:
    """Return what a branch adds behind a convolution, where it has one."""
    return seen[f"{kind} spread"][1] if f"{kind} spread" in seen else added


def _on_streams(streams: Streams, kind: str, added: Tensor, seen: dict, width: int) -> Tensor:
    """Return what a branch adds to all streams side by side, given what it adds to one."""
    if isinstance(streams, SharedBlock):  # to the last of three, or to the first
        nothing = torch.zeros_like(added)
        return torch.cat([nothing, nothing, added] if streams.layer_is == "block" else [added, nothing, nothing], 1)
    hyper = next((name for name in _HYPER[kind == "mlp" :: 2] if name in seen), None)
    if hyper is not None:
        return (seen[hyper][1].view(len(added), -1, 1) * added[:, None]).flatten(1)
    if kind == "attention":  # P as it is, then what the layer works on
        return torch.cat([added.new_zeros(len(added), width), added / 2**0.5], 1)
    streams = (1 + seen["altup.correction_coefs"][1])[:, :, None] * added[:, None]
    streams[:, 1:] += seen["embed"][1][:, None]
    return streams.flatten(1)


def _behind_stream(branch: Branch, stream: tuple[Tensor, Tensor] | None, added: Tensor) -> Tensor:
    """Return what a branch adds, behind a norm of the sum, given the norm's input and output."""
    if stream is None or branch.stream is None or branch.stream.is_factor:
        return added
    total, normed = stream
    if not branch.stream.centred:
        return added * (normed / total)
    before, norm = total - added, branch.stream  # without what was in the stream before
    std = (total.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    return normed - (before - before.mean(-1, keepdim=True)) / std * (1.0 if norm.weight is None else norm.weight)


def _behind_layer(adapter: Adapter, layer: int, seen: dict, added: Tensor) -> Tensor:
    """Return what MLPs add with a gate of the token's embedding among them, behind the layer's factor."""
    added, factor = added + seen["embed"][1] if "embed" in seen else added, adapter.kind(layer).layer_factor
    return added if factor is None else added * adapter.block(layer).get_buffer(factor)
