"""The hooks on a layer's MLPs: on experts and their router, on the MLP itself, on a gate of the token's embedding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..adapters import Adapter, HeadScale, InputGate
from ..adapters.layer_mlps import beside_modules, plain_norm
from ..adapters.paths import below
from .plugged import is_recording
from .recorder import Recorder
from .recording import RecordingHook


def hook_mlps(adapter: Adapter, index: int, recorder: Recorder, undo: ExitStack) -> None:
    """Record what a trace holds of the MLPs of a layer that has any. ``undo`` takes the hooks off."""
    _MlpHooks(adapter, index, recorder, undo).put()


class _MlpHooks:
    def __init__(self, adapter: Adapter, index: int, recorder: Recorder, undo: ExitStack) -> None:
        self.adapter, self.index, self.recorder, self.undo = adapter, index, recorder, undo
        self.record, self.kind, self.block = recorder.layers[index], adapter.kind(index), adapter.block(index)

    def put(self) -> None:
        if self.adapter.is_mixture(self.index):
            self._before(self.adapter.experts_module(self.index), "experts_input")
            self.undo.callback(self.adapter.watch_router(self.index, self._note_choice))
        if self.adapter.has_dense_mlp(self.index):
            mlps = self.adapter.mlps(self.index)
            gate = next(mlp.gate for mlp in mlps if mlp.is_dense)
            change = (lambda x: gate.select(x).contiguous()) if gate.is_fused else None
            added = self.adapter.added_to(self.index, "gate_proj")
            self._after(self.adapter.module(self.index, "gate_proj"), "gate", change, added)
            self._before(self.adapter.module(self.index, "down_proj"), "act")
            inner = next((mlp.inner for mlp in mlps if mlp.inner is not None), None)
            module = self.adapter.module(self.index, "mlp_inner_norm")
            if inner is not None and module is not None:
                self._before(module, "inner_scale", inner.scale)
        beside = None if self.kind.experts is None else self.kind.experts.beside
        if beside is not None and self.adapter.is_mixture(self.index):
            _, *outputs = beside_modules(self.block, beside)
            for name, module in zip(("experts_scale", "dense_scale"), outputs, strict=True):
                self._before(module, name, plain_norm(module).scale)
        if self.kind.input_gate is not None:
            self._hook_gate(self.kind.input_gate)
        if self.kind.mlp_scale is not None:
            self._hook_scale(self.kind.mlp_scale)

    def _before(self, module: nn.Module, name: str, change: Callable[[Tensor], Tensor] | None = None) -> None:
        self.undo.callback(RecordingHook(self.recorder, self.record, name, change).before(module))

    def _after(
        self,
        module: nn.Module,
        name: str,
        change: Callable[[Tensor], Tensor] | None = None,
        added: nn.Module | None = None,
    ) -> None:
        self.undo.callback(RecordingHook(self.recorder, self.record, name, change).after(module, added))

    def _hook_gate(self, gate: InputGate) -> None:
        module, norm = below(self.block, gate.gate), below(self.block, gate.output_norm)
        if self.kind.streams is None:
            self._before(module, "gate_resid")
        self._after(module, "token_gate")
        self._before(below(self.block, gate.down), "token_act")
        self._before(norm, "token_scale", plain_norm(norm).scale)

        def called(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if is_recording(self.recorder):
                given = kwargs[gate.argument] if gate.argument in kwargs else args[gate.place]
                self.recorder.keep(self.record, "token_embedding", given.detach().flatten(0, -2).contiguous())

        self.undo.callback(self.block.register_forward_pre_hook(called, with_kwargs=True).remove)

    def _hook_scale(self, scale: HeadScale) -> None:
        """Record the factors of what the MLP gives, once its projections have been called."""
        module, seen = self.adapter.module(self.index, "mlp"), {}
        for name in scale.projections:
            hook = RecordingHook(self.recorder, seen, name, as_is=True)
            self.undo.callback(hook.after(module.get_submodule(name)))

        def called(module: nn.Module, args: tuple, output: Any) -> None:
            if is_recording(self.recorder):
                outputs = [seen[name].detach().flatten(0, -2) for name in scale.projections]
                self.recorder.keep(self.record, "mlp_out_ratio", scale.read(module, outputs, outputs[0]))

        self.undo.callback(module.register_forward_hook(called).remove)

    def _note_choice(self, weights: Tensor, chosen: Tensor) -> None:
        """Record a router's weights and indices (T, K)."""
        if is_recording(self.recorder):
            self.recorder.keep(self.record, "router_weights", weights.detach())
            self.recorder.keep(self.record, "chosen", chosen)
