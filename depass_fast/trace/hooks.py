"""The hooks of a recorded forward pass: they write into their recorder, and ignore the passes of other threads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter, Attention, HeadScale, Keyed, Latent, Mixer, Norm
from ..adapters.head_experts import watch_heads
from ..adapters.maps import Joined, Linear
from .consistency import WATCHED
from .head_experts import CHOSEN, WEIGHTS
from .mixer_check import heads_in_float32
from .mixing import convolve
from .mlp_hooks import hook_mlps
from .plugged import is_recording
from .recorder import Recorder
from .recording import RecordingHook, keeps


class LayerHooks:
    """The hooks of one layer. ``undo`` removes them all."""

    def __init__(self, adapter: Adapter, index: int, recorder: Recorder, undo: ExitStack) -> None:
        self.adapter, self.index, self.recorder, self.undo = adapter, index, recorder, undo
        self.record = recorder.layers[index]
        self.attention = adapter.attention(index) if adapter.has_attention(index) else None
        self.mlp = adapter.mlps(index)[0] if adapter.has_mlp(index) else None
        self.mixer, self.head_scale = adapter.kind(index).mixer, adapter.kind(index).head_scale
        self.keyed, self.head_experts = adapter.kind(index).keyed, adapter.kind(index).head_experts

    def put(self) -> None:
        """Hook up everything that a trace holds of the layer."""
        self._hook_stream()
        if self.recorder.is_checking:
            self._hook_watched()
            self._hook_spread()
        if self.attention is not None:
            self._hook_values(self.attention)
        if self.mlp is not None:
            hook_mlps(self.adapter, self.index, self.recorder, self.undo)
        if self.head_experts is not None:
            self.undo.callback(watch_heads(self.adapter.block(self.index), self.head_experts, self._note_heads))
        if self.mixer is not None:
            self._observe_mixer(self.mixer)
        elif self.keyed is not None:
            self._observe_keyed(self.keyed)
        elif self.attention is not None and self.adapter.observed is not None:
            self._observe_attention()
        if self.head_scale is not None:
            self._observe_head_scale(self.head_scale)

    def _note_heads(self, weights: Tensor, chosen: Tensor) -> None:
        """Record the weights and indices (T, K) of the experts of heads that a router decides on."""
        if is_recording(self.recorder):
            self.recorder.keep(self.record, WEIGHTS, weights.detach())
            self.recorder.keep(self.record, CHOSEN, chosen)

    def _before(self, part: str, name: str, change: Callable[[Tensor], Tensor] | None = None) -> None:
        self.undo.callback(RecordingHook(self.recorder, self.record, name, change).before(self._module(part)))

    def _after(self, part: str, name: str, change: Callable[[Tensor], Tensor] | None = None) -> None:
        added = self.adapter.added_to(self.index, part)
        self.undo.callback(RecordingHook(self.recorder, self.record, name, change).after(self._module(part), added))

    def _module(self, part: str) -> nn.Module:
        module = self.adapter.module(self.index, part)
        assert module is not None
        return module

    def _has(self, part: str) -> bool:
        return self.adapter.module(self.index, part) is not None

    def _hook_stream(self) -> None:
        """Record the residual stream, and the norms that lie between a branch and the stream."""
        if self.attention is None:
            self._before("mlp_norm" if self._has("mlp_norm") else "mlp", "resid_pre")
        else:
            self._before("attention_norm" if self._has("attention_norm") else "attention", "resid_pre")
        if self.attention is None or self.mlp is None:
            pass
        elif self.adapter.is_parallel:
            self._after("o_proj", "attention_output")
        else:
            self._before("mlp_norm" if self._has("mlp_norm") else "mlp", "resid_mid")
        for kind, branch in (("attention", self.attention), ("mlp", self.mlp)):
            if branch is None:
                continue
            if branch.output is not None and not branch.output.is_factor:
                self._before(f"{kind}_output_norm", f"{kind}_out_scale", branch.output.scale)
            if branch.stream is not None and not branch.stream.is_factor:
                self._before(f"{kind}_stream_norm", f"{kind}_sum")

    def _hook_watched(self) -> None:
        """Record what the consistency check compares, at the watched positions."""
        has_mlp = self.mlp is not None and self.adapter.has_dense_mlp(self.index)
        for part, (before, after) in WATCHED.items():
            if not (self.attention is not None if part in ("v_proj", "o_proj") else has_mlp):
                continue
            last = "down_behind" if part == "down_proj" and self._has("down_behind") else part
            if part == "o_proj" and self.head_experts is not None:  # which reads and writes in an order of its own
                self._after("attention", after, lambda x: x[self.recorder.watched])
                continue
            self._before(part, before, lambda x: x[self.recorder.watched])
            self._after(last, after, lambda x: x[self.recorder.watched])

    def _hook_spread(self) -> None:
        """Record what enters a convolution behind a branch, at all positions."""
        for branch in ("attention", "mlp"):
            if self._has(f"{branch}_conv"):
                self._before(f"{branch}_conv", f"{branch}_given")

    def _hook_values(self, attention: Attention) -> None:
        """Record the latent that values come from, and the clamping of values."""
        if isinstance(attention.v, Latent):
            self._before("v_norm", "latent_scale", attention.v.norm.scale)
        if attention.value_norm is not None and attention.source is None:
            self._after("v_proj", "head_scales", attention.value_scales)
        if attention.value_limit is not None:
            self._after("v_proj", "value_ratio", attention.clamped_ratio)

    def _seen(self, names: tuple[str, ...]) -> Callable[[], list[Tensor]]:
        """Watch projections of the attention; return a function that gives their last outputs (T, C)."""
        module, seen = self._module("attention"), {}
        for name in names:
            self.undo.callback(RecordingHook(self.recorder, seen, name, as_is=True).after(module.get_submodule(name)))

        def outputs() -> list[Tensor]:
            if missing := [name for name in names if name not in seen]:
                home = self.adapter.path(self.index, "attention")
                raise RuntimeError(f"layer {self.index}: the forward pass called no {', '.join(missing)} of {home}.")
            return [seen[name].flatten(0, -2) for name in names]

        return outputs

    def _in_place_of_heads(self, compute: Callable[[Tensor], Tensor]) -> None:
        """Give ``o_proj``, or what is in front of it, what ``compute`` makes of its input (T, H·d)."""

        def replaced(projection: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            if not is_recording(self.recorder):
                return None
            return (compute(args[0].flatten(0, -2)).view(args[0].shape).to(args[0].dtype),)

        self.undo.callback(self._module(self._last).register_forward_pre_hook(replaced).remove)

    @property
    def _last(self) -> str:
        """The part that reads what heads give."""
        return "o_front" if self._has("o_front") else "o_proj"

    def _observe_keyed(self, keyed: Keyed) -> None:
        """Record keys that are values by the outputs of their projections, and replace what heads give by ours."""
        module, recorder, called = self._module("attention"), self.recorder, {}
        seen, values, entries = self._seen(keyed.projections), self._seen_output("v_proj"), None
        if keyed.rate is not None:
            entries = self._seen_output("v_entries")
        if self.adapter.has_indexer(self.index):
            hook = RecordingHook(recorder, called, "chosen", as_is=True)
            self.undo.callback(hook.after(self._module("indexer")))

        def call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if is_recording(recorder):
                called["kwargs"] = kwargs

        def heads(given: Tensor) -> Tensor:
            raw = values() if entries is None else torch.cat([values(), entries()], 1)
            angles = keyed.embedding(module, called["kwargs"])
            return recorder.turn_keys(self.index, keyed, raw, keyed.read(module, seen()), angles, called.get("chosen"))

        self.undo.callback(module.register_forward_pre_hook(call, with_kwargs=True).remove)
        self._in_place_of_heads(heads)

    def _observe_mixer(self, mixer: Mixer) -> None:
        """Record a recurrence by the outputs of its projections, and replace what its heads give by ours."""
        module, names, recorder = self._module("attention"), mixer.projections, self.recorder
        sides = self.adapter.sides(self.index)
        attention = self.attention if sides is None else sides[1]
        assert attention is not None
        seen, values = self._seen(names), self._seen_values(attention.v_input)

        def by_prompt(x: Tensor, conv: nn.Conv1d, part: Callable[[Tensor], Tensor] | None = None) -> Tensor:
            weight, bias = conv.weight, conv.bias
            if part is not None:
                weight, bias = part(weight), None if bias is None else part(bias)
            return convolve(x, weight[:, 0].to(x), None if bias is None else bias.to(x), recorder.lengths)

        def heads(given: Tensor) -> Tensor:
            record = recorder.layers[self.index]
            named = (call["kwargs"],) if mixer.attends else ()
            recurrence = mixer.read(module, seen(), by_prompt, *named)
            out = recorder.mix(self.index, mixer, recurrence, values())
            recorder.keep_given(self.index, record, out)
            if again is not None and given.dtype.itemsize < 4:
                own = heads_in_float32(module, again(), self._module(self._last), call["args"], call["kwargs"])
                if own is not None:
                    recorder.keep(record, "heads_in_float32", own[recorder.watched])
            return out

        call: dict[str, Any] = {}

        def called(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if is_recording(recorder):
                call.update(args=args, kwargs=kwargs)

        again = self._all_seen(module) if recorder.is_checking and self._is_first_mixer(module) else None
        if mixer.attends or again is not None:
            self.undo.callback(module.register_forward_pre_hook(called, with_kwargs=True).remove)
        self._in_place_of_heads(heads)

    def _is_first_mixer(self, module: nn.Module) -> bool:
        """True if no layer before has a recurrence of this class."""
        kinds = (self.adapter.kind(index).mixer for index in range(self.index))
        before = (self.adapter.module(index, "attention") for index, mixer in enumerate(kinds) if mixer is not None)
        return all(type(one) is not type(module) for one in before)

    def _all_seen(self, module: nn.Module) -> Callable[[], dict[nn.Module, Tensor]] | None:
        """Watch all projections of a recurrence; return a function that gives the last output (T, C) of each.

        None where attention, and not the mixer's own code, mixes positions.
        """
        if self.mixer is None or self.mixer.attends:
            return None
        names = (*self.mixer.projections, *(() if self.head_scale is None else self.head_scale.projections))
        parts, outputs, values = (
            [module.get_submodule(name) for name in names],
            self._seen(names),
            self._module("v_proj"),
        )
        seen_values = self._seen_output("v_proj")
        return lambda: {values: seen_values(), **dict(zip(parts, outputs(), strict=True))}

    def _seen_output(self, part: str) -> Callable[[], Tensor]:
        """Watch a projection; return a function that gives its last output (T, C)."""
        seen: dict[str, Any] = {}
        hook = RecordingHook(self.recorder, seen, "values", as_is=True)
        self.undo.callback(hook.after(self._module(part)))
        return lambda: seen["values"].flatten(0, -2)

    def _seen_values(self, projection: Linear) -> Callable[[], Tensor]:
        """Watch the projection to the values; return a function that gives the last values (T, C)."""
        if not isinstance(projection, Joined):
            output = self._seen_output("v_proj")
            return lambda: projection.select(output())
        seen: dict[str, Any] = {}  # another module computes the others
        hook = RecordingHook(self.recorder, seen, "values", as_is=True)
        self.undo.callback(hook.before(self._module("v_proj")))
        return lambda: projection.project(seen["values"].flatten(0, -2))

    def _observe_head_scale(self, scale: HeadScale) -> None:
        """Record the factors of what heads give, and apply them by ourselves."""
        module, recorder, seen = self._module("attention"), self.recorder, self._seen(scale.projections)

        def scaled(given: Tensor) -> Tensor:
            heads = recorder.layers[self.index].pop("heads_given", None)
            if heads is None:  # attention past transformers' interface: the recorder will miss what it needs
                return given
            constant = None if scale.constant is None else scale.constant(module, seen())
            return recorder.scale_heads(self.index, heads, scale.read(module, seen(), heads), constant)

        self._in_place_of_heads(scaled)

    def _observe_attention(self) -> None:
        """Take Q, K and V from the projections of attention that is not pluggable, and replace its output by ours."""
        adapter, recorder = self.adapter, self.recorder
        module, observed = self._module("attention"), adapter.observed
        assert observed is not None
        seen: dict[str, Any] = {}

        def called(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if is_recording(recorder):
                seen["kwargs"] = kwargs

        def replaced(projection: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            if not is_recording(recorder):
                return None
            outputs = [seen[name] for name in observed.projections]
            mask = {"window": adapter.window(self.index, None, recorder.implementation), "softcap": None}
            out = recorder.attend(self.index, **{**mask, **observed.read(module, outputs, seen["kwargs"])})
            return (out.reshape(args[0].shape).to(args[0].dtype),)

        self.undo.callback(module.register_forward_pre_hook(called, with_kwargs=True).remove)
        for name in observed.projections:
            self.undo.callback(RecordingHook(recorder, seen, name, as_is=True).after(module.get_submodule(name)))
        self.undo.callback(self._module("o_proj").register_forward_pre_hook(replaced).remove)


def watch_streams(adapter: Adapter, recorder: Recorder, undo: ExitStack) -> None:
    """Hook up what a model of several streams freezes; ``undo`` takes the hooks off. Without such nothing is done."""
    streams = adapter.family.streams
    if streams is None:
        return
    for index in range(adapter.n_layers):
        for module, watch in adapter.streams(index).watches(adapter.block(index)):
            undo.callback(keeps(recorder, recorder.layers[index], module, watch))
        own = adapter.embeddings_of(index)
        if own is not None:
            undo.callback(keeps(recorder, recorder.layers[index - 1], own, _entering))
    module, watch = streams.end(adapter.decoder, adapter.blocks[-1])
    undo.callback(keeps(recorder, recorder.final, module, watch))


def _entering(args: tuple, kwargs: dict[str, Any], output: Tensor) -> dict[str, Tensor]:
    """Keep what a layer's own embeddings add to the streams in front of it."""
    return {"entering": output.detach().flatten(0, -2)}


def full_precision(norm: Norm) -> Callable[..., Tensor]:
    """A hook that computes a norm in float64.

    transformers computes norms in float32 even in a float64 model: that rounding would be all of the error.
    """

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        y = norm.normed(args[0])
        return y if norm.bias is None else y + norm.bias

    return hook
