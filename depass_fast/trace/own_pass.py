"""The forward pass of the commonest models, by ourselves: fewer operations, and none of the hooks.

A short prompt waits for Python: of the time of a trace, the products are a small part. So models of the layout of Llama
go through a loop of our own, which does what their code does, in the same order and with the same roundings, and writes
into the recorder what hooks would have written.

Such a pass is for models that are as transformers defines them, to the last function: no hook, no subclass, no adapter,
nothing patched. It is admitted by comparison. The first pass of every computation, and of prompts twice as long, goes
through the model's own code (:mod:`.consistency`). There every layer of ours is given what the model's was given, and
must give what that gave: the same bits on a CPU, and up to rounding elsewhere, where norms are fused.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._device import DeviceContext

from ..adapters import Adapter, Norm
from ..adapters.tuned import modules_of
from ..runtime.memory import is_out_of_memory
from .consistency import Checked, differences
from .record import Trace
from .recorder import Recorder

_WINDOWS: dict[str, Callable[[Any], int | None]] = {  # what attention modules announce as their sliding window
    "llama": lambda attention: None,
    "mistral": lambda attention: getattr(attention.config, "sliding_window", None),
    "qwen2": lambda attention: getattr(attention, "sliding_window", None),
    "qwen3": lambda attention: getattr(attention, "sliding_window", None),
}
_RECORDED = ("q", "k", "resid_mid", "gate", "act")  # of a layer, beside what enters it
_ROTATION = ("apply_rotary_pos_emb", "rotate_half")  # functions of a model's file that turn queries and keys
_CODE = ("forward", "__call__", "_call_impl")  # what runs when a module is called
_KERNELS = "kernels.layer.layer"
_LIBRARIES = ("torch", "transformers", "depass_fast")
_ROWS = 1024  # compared at once: float32 copies of them are made
_agreed = Checked()  # the computations of every model that our pass was compared with

Angles = tuple[Tensor, Tensor]  # cos and sin (T, 1, d), the first half of sin negative


@dataclass(frozen=True)
class _Layer:
    """The modules of one layer, and the mask of its attention."""

    index: int
    block: Any
    norm: Norm
    mlp_norm: Norm
    of_heads: tuple[Norm, Norm] | None  # norms of every query and key
    mask: dict[str, Any]

    @staticmethod
    def of(adapter: Adapter, index: int) -> _Layer:
        block: Any = adapter.block(index)
        attention = block.self_attn
        announced = _WINDOWS[_kind(block) or ""](attention)
        mask = {
            "scale": attention.scaling,
            "window": adapter.window(index, announced, adapter.config._attn_implementation),
            "softcap": None,
            "chunked": adapter.chunks(index),
        }
        norm, mlp_norm = adapter.made_norm(block.input_layernorm), adapter.made_norm(block.post_attention_layernorm)
        of_heads = None
        if hasattr(attention, "q_norm"):
            of_heads = adapter.made_norm(attention.q_norm), adapter.made_norm(attention.k_norm)
        return _Layer(index, block, norm, mlp_norm, of_heads, mask)

    def forward(self, x: Tensor, angles: Angles, recorder: Recorder) -> Tensor:
        """Write into the recorder what is recorded of this layer, and return what leaves it: (1, T, D), as x is."""
        record, attention, mlp = recorder.layers[self.index], self.block.self_attn, self.block.mlp
        recorder.keep(record, "resid_pre", x[0])
        read, width = self.norm.normed(x), attention.head_dim
        q, k, v = (
            _project(one, read)[0].unflatten(1, (-1, width))
            for one in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k, v = (one.transpose(0, 1)[None] for one in (*self._turned(q, k, angles), v))
        heads = recorder.attend(self.index, q, k, v, **self.mask).flatten(2)
        mid = x + _project(attention.o_proj, heads)
        recorder.keep(record, "resid_mid", mid[0])
        read = self.mlp_norm.normed(mid)
        gate = _project(mlp.gate_proj, read)
        recorder.keep(record, "gate", gate[0])
        act = mlp.act_fn(gate) * _project(mlp.up_proj, read)
        recorder.keep(record, "act", act[0])
        return mid + _project(mlp.down_proj, act)

    def _turned(self, q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Return queries and keys (T, H, d) with their positions: by the rotary embedding, behind their norms."""
        if self.of_heads is not None:
            q, k = (norm.normed(x) for norm, x in zip(self.of_heads, (q, k), strict=True))
        (cos, sin), heads, both = angles, q.shape[1], torch.cat([q, k], 1)
        other = both.roll(both.shape[2] // 2, 2).mul_(sin)
        both.mul_(cos)
        return both[:, :heads] + other[:, :heads], both[:, heads:] + other[:, heads:]


@dataclass(frozen=True)
class OwnPass:
    """A forward pass of our own through a model that has nothing but such layers."""

    adapter: Adapter
    layers: list[_Layer]

    @staticmethod
    def of(adapter: Adapter) -> OwnPass:
        """The pass of a model that it can run."""
        return OwnPass(adapter, [_Layer.of(adapter, index) for index in range(adapter.n_layers)])

    @property
    def _decoder(self) -> Any:
        return self.adapter.decoder

    def run(self, recorder: Recorder, ids: Tensor, positions: Tensor, done: Callable[[], None] | None = None) -> None:
        """Take prompts that the recorder has entered through all layers, packed ``ids`` and ``positions`` (T,).

        ``done`` is called behind every layer.
        """
        x: Tensor = self._decoder.embed_tokens(ids[None])
        angles = self._angles(x, positions)
        for layer in self.layers:
            x = layer.forward(x, angles, recorder)
            if done is not None:
                done()
        recorder.keep(recorder.final, "resid_final", x[0])
        recorder.keep(recorder.final, "normed_final", self._end(x)[0])

    def _end(self, x: Tensor) -> Tensor:
        norm = self.adapter.final_norm()
        assert norm is not None
        return norm.normed(x)

    def _angles(self, x: Tensor, positions: Tensor) -> Angles:
        cos, sin = (one[0] for one in self._decoder.rotary_emb(x, positions[None]))
        half = sin.shape[1] // 2
        return cos[:, None], torch.cat([-sin[:, :half], sin[:, half:]], 1)[:, None]

    @torch.no_grad()
    def agrees(self, trace: Trace, records: list[dict[str, Any]]) -> bool:
        """True if every layer gives what the model's own gave, from what that was given, in its last forward pass.

        ``records`` are those of the model's own passes. One token says nothing: it is turned by no angle.
        """
        lengths = [trace.length(prompt) for prompt in range(trace.n_prompts)]
        lengths = lengths[-1:] if self.adapter.one_by_one else lengths
        positions = torch.cat([torch.arange(one, device=trace.input_ids.device) for one in lengths])
        last = slice(len(trace.input_ids) - len(positions), None)
        entering: Tensor = self._decoder.embed_tokens(trace.input_ids[None, last])
        angles = self._angles(entering, positions)
        if max(lengths) < 2 or angles[0].shape[2] != self.layers[0].block.self_attn.head_dim:  # a part is turned
            return False
        if not _are_the_same([(entering[0], records[0]["resid_pre"][last])]):
            return False
        recorder, entered = Recorder(self.adapter, False), [one["resid_pre"] for one in records[1:]]
        recorder.enter(lengths)
        for layer, record, after in zip(self.layers, records, [*entered, trace.resid_final], strict=True):
            leaving = layer.forward(record["resid_pre"][None, last], angles, recorder)[0]
            own = recorder.layers[layer.index]
            if own["mask"] != record["mask"] or any(name not in record for name in _RECORDED):
                return False
            pairs = [(leaving, after[last]), *((own[name], record[name][last]) for name in _RECORDED)]
            if not _are_the_same(pairs):
                return False
            own.clear()  # a layer at a time
        return _are_the_same([(self._end(trace.resid_final[None, last])[0], trace.normed_final[last])])


def admit(adapter: Adapter, computation: tuple, trace: Trace, records: list[dict[str, Any]]) -> None:
    """Compare our pass with one of the model's own code, and admit it for this ``computation`` where they agree."""
    if not can_run(adapter):
        return
    key = _key(adapter, computation)
    _agreed.forget(adapter.model, key)
    try:
        agrees = OwnPass.of(adapter).agrees(trace, records)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return  # what was asked for may have room enough without this comparison
    if agrees:
        _agreed.remember(adapter.model, key)


def admitted(adapter: Adapter, computation: tuple) -> OwnPass | None:
    """Return the pass of our own through a model, if it may stand in the place of the model's."""
    if _is_watched() or not can_run(adapter) or not _agreed.knows(adapter.model, _key(adapter, computation)):
        return None
    return OwnPass.of(adapter)


def can_run(adapter: Adapter) -> bool:
    """True if a model is one of those in :data:`_WINDOWS`, and nothing of it is another's, or hooked."""
    decoder: Any = adapter.decoder
    blocks, kind = list(adapter.blocks), _kind(decoder)
    if kind is None or any(_kind(block) != kind for block in blocks):
        return False
    if adapter.config.num_hidden_layers != len(blocks) or len(set(blocks)) != len(blocks) or _has_global_hooks():
        return False
    home = vars(sys.modules[type(decoder).__module__])
    if not all(map(_has_plain_parts, blocks)) or not all(_is_genuine(home.get(name)) for name in _ROTATION):
        return False
    modules = modules_of(decoder)
    weights = [one for module in modules for one in module._parameters.values() if one is not None]
    alike = {(one.device, one.dtype) for one in weights}
    if len(alike) != 1 or any(type(one) is not nn.Parameter for one in weights):
        return False
    return all(map(_is_of_its_class, modules)) and all(map(_is_as_defined, {type(module) for module in modules}))


def _kind(module: nn.Module) -> str | None:
    """The name of the model that a module is of, as transformers defines it; None of any other module."""
    home = type(module).__module__
    return next((kind for kind in _WINDOWS if home == f"transformers.models.{kind}.modeling_{kind}"), None)


def _has_plain_parts(block: Any) -> bool:
    """True if all projections of a layer are linear modules, and all norms those of the model's file."""
    attention, mlp = block.self_attn, block.mlp
    projections = [getattr(attention, f"{name}_proj", None) for name in "qkvo"]
    projections += [getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")]
    norms = [block.input_layernorm, block.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    return all(type(one) is nn.Linear for one in projections) and all(_kind(one) is not None for one in norms)


def _is_of_its_class(module: nn.Module) -> bool:
    """True unless a module has hooks, or code or parts that its class does not know of."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    own = vars(module)
    return not any(hooks) and own.keys().isdisjoint({*_CODE, *module._modules})


def _is_as_defined(kind: type[nn.Module]) -> bool:
    """True for a class of torch or transformers whose code is its own."""
    return _is_of_a_library(kind.__module__) and all(_is_genuine(getattr(kind, name)) for name in _CODE)


def _is_genuine(function: Any) -> bool:
    """True for a function of torch or transformers, with all that it wraps; a bridge of ours may be around it.

    The package `kernels` has a module in the place of a function, which runs that as long as no kernel is put in.
    """
    if isinstance(function, nn.Module):
        function = _held(function)
    while isinstance(function, FunctionType):
        home = function.__globals__.get("__name__", "")
        written_in = getattr(sys.modules.get(home), "__file__", None)
        if not _is_of_a_library(home) or function.__code__.co_filename != written_in:
            return False
        if not hasattr(function, "__wrapped__"):
            return True
        function = function.__wrapped__
    return False


def _held(module: nn.Module) -> Any | None:
    """The function that a module of the package `kernels` runs; None of any other module."""
    runs = getattr(type(module), "forward", None)
    if type(module).__module__ != _KERNELS or not isinstance(runs, FunctionType) or not _is_of_its_class(module):
        return None
    held = [cell.cell_contents for cell in runs.__closure__ or ()]
    return held[0] if runs.__globals__.get("__name__") == _KERNELS and len(held) == 1 else None


def _is_of_a_library(name: str) -> bool:
    return name.partition(".")[0] in _LIBRARIES


def _key(adapter: Adapter, computation: tuple) -> tuple:
    """A key of a computation, with its device and the functions of :data:`_ROTATION`, which belong to no module."""
    home = vars(sys.modules[type(adapter.decoder).__module__])
    return computation, adapter.device.type, *(weakref.ref(home[name]) for name in _ROTATION)


def _is_watched() -> bool:
    """True where a user's mode sees every operation of torch: ours are others than the model's."""
    modes = torch.overrides._get_current_function_mode_stack()
    return torch._C._len_torch_dispatch_stack() > 0 or any(not isinstance(mode, DeviceContext) for mode in modes)


def _has_global_hooks() -> bool:
    return bool(module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)


def _project(module: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module.weight, module.bias)


def _are_the_same(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """True if tensors (S, ...) have the same bits on a CPU, and elsewhere differ by rounding alone."""
    if pairs[0][0].device.type == "cpu":
        return all(torch.equal(own, its) for own, its in pairs)
    return are_rounded_alike(pairs)


def are_rounded_alike(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """True if tensors (S, ...) of one dtype differ by rounding alone."""
    eps = torch.finfo(pairs[0][0].dtype).eps
    parts = [both for own, its in pairs for both in zip(own.split(_ROWS), its.split(_ROWS), strict=True)]
    apart = torch.stack([differences(own.flatten(1), its.flatten(1)).max() for own, its in parts]).max()
    return bool(apart <= (1.5 if eps > 1e-4 else 64) * eps)
