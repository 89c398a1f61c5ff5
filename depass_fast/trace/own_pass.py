"""The forward pass of the commonest models, by ourselves: half as many operations, and none of the model's hooks.

A short prompt waits for Python: of the time of a trace, the products are a small part. So models of the layout of Llama
go through a loop of our own, which does what their code does, in the same order and with the same roundings, and writes
into the recorder what hooks would have written.

Such a pass is admitted by comparison. The first pass of every computation goes through the model's own code
(:mod:`.consistency`). There every layer of ours is given what the model's was given, and must give what that gave. The
model's own code runs wherever anything differs, or may differ: hooks, a subclass, adapters, quantised weights.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..adapters import Adapter, Norm
from ..adapters.tuned import modules_of
from .consistency import Checked, differences
from .record import Trace
from .recorder import Recorder

_COMPARED = 256  # positions of a prompt
_WINDOWS: dict[str, Callable[[Any], int | None]] = {  # what attention modules announce as their sliding window
    "llama": lambda attention: None,
    "mistral": lambda attention: getattr(attention.config, "sliding_window", None),
    "qwen2": lambda attention: getattr(attention, "sliding_window", None),
    "qwen3": lambda attention: getattr(attention, "sliding_window", None),
}
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
        """Write into the recorder what is recorded of this layer, and return what leaves it: (T, D) -> (T, D)."""
        record, attention, mlp = recorder.layers[self.index], self.block.self_attn, self.block.mlp
        recorder.keep(record, "resid_pre", x)
        read, width = self.norm.normed(x), attention.head_dim
        q, k, v = (_project(one, read) for one in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = self._turned(q.unflatten(1, (-1, width)), k.unflatten(1, (-1, width)), angles)
        q, k, v = (one.transpose(0, 1)[None] for one in (q, k, v.unflatten(1, (-1, width))))
        heads = recorder.attend(self.index, q, k, v, **self.mask)[0].flatten(1)
        mid = x + _project(attention.o_proj, heads)
        recorder.keep(record, "resid_mid", mid)
        read = self.mlp_norm.normed(mid)
        gate = _project(mlp.gate_proj, read)
        recorder.keep(record, "gate", gate)
        act = mlp.act_fn(gate) * _project(mlp.up_proj, read)
        recorder.keep(record, "act", act)
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
    def of(adapter: Adapter) -> OwnPass | None:
        """The pass of a model, or None where the model's own code has to run."""
        if not _can_run(adapter):
            return None
        return OwnPass(adapter, [_Layer.of(adapter, index) for index in range(adapter.n_layers)])

    @property
    def _decoder(self) -> Any:
        return self.adapter.decoder

    def run(self, recorder: Recorder, ids: Tensor, positions: Tensor, done: Callable[[], None] | None = None) -> None:
        """Take prompts that the recorder has entered through all layers, packed ``ids`` and ``positions`` (T,).

        ``done`` is called behind every layer.
        """
        x: Tensor = self._decoder.embed_tokens(ids)
        angles = self._angles(x, positions)
        for layer in self.layers:
            x = layer.forward(x, angles, recorder)
            if done is not None:
                done()
        norm = self.adapter.final_norm()
        assert norm is not None
        recorder.keep(recorder.final, "resid_final", x)
        recorder.keep(recorder.final, "normed_final", norm.normed(x))

    def _angles(self, x: Tensor, positions: Tensor) -> Angles:
        cos, sin = (one[0] for one in self._decoder.rotary_emb(x[None], positions[None]))
        half = sin.shape[1] // 2
        return cos[:, None], torch.cat([-sin[:, :half], sin[:, half:]], 1)[:, None]

    @torch.no_grad()
    def agrees(self, trace: Trace, records: list[dict[str, Any]]) -> bool:
        """True if every layer gives what the model's own gave, from what that was given, for the first prompt.

        ``records`` are those of the model's own pass.
        """
        n = min(trace.length(0), _COMPARED)
        positions, span = torch.arange(n, device=trace.input_ids.device), slice(0, n)
        entering: Tensor = self._decoder.embed_tokens(trace.input_ids[span])
        angles, last = self._angles(entering, positions), len(self.layers) - 1
        if angles[0].shape[2] != self.layers[0].block.self_attn.head_dim:  # a part of every head is turned
            return False
        apart = [differences(entering, records[0]["resid_pre"][span])]
        for layer, record in zip(self.layers, records, strict=True):
            recorder = Recorder(self.adapter, False)
            recorder.enter([n])
            leaving = layer.forward(record["resid_pre"][span], angles, recorder)
            own = recorder.layers[layer.index] | {"leaving": leaving}
            after = records[layer.index + 1]["resid_pre"] if layer.index < last else trace.resid_final
            names = ("q", "k", "resid_mid", "gate", "act")
            if own["mask"] != record["mask"] or any(name not in record for name in names):
                return False
            theirs = {"leaving": after} | {name: record[name] for name in names}
            apart += [differences(own[name].flatten(1), one[span].flatten(1)) for name, one in theirs.items()]
        norm = self.adapter.final_norm()
        assert norm is not None
        apart.append(differences(norm.normed(trace.resid_final[span]), trace.normed_final[span]))
        return float(torch.cat(apart).max()) <= _allowed(self.adapter.dtype)


def admit(adapter: Adapter, computation: tuple, trace: Trace, records: list[dict[str, Any]]) -> None:
    """Compare our pass with one of the model's own code, and admit it for this ``computation`` where they agree."""
    own = OwnPass.of(adapter)
    if own is not None and own.agrees(trace, records):
        _agreed.remember(adapter.model, (computation, _rotation(adapter)))


def admitted(adapter: Adapter, computation: tuple) -> OwnPass | None:
    """Return the pass of our own through a model, if it may stand in the place of the model's own."""
    own = OwnPass.of(adapter)
    return None if own is None or not _agreed.knows(adapter.model, (computation, _rotation(adapter))) else own


def _can_run(adapter: Adapter) -> bool:
    """True if a model is one of those in :data:`_WINDOWS`, and nothing of it is another's, or hooked."""
    decoder: Any = adapter.decoder
    blocks, kind = list(adapter.blocks), _kind(decoder)
    if kind is None or any(_kind(block) != kind for block in blocks) or not adapter.is_uniform:
        return False
    if adapter.config.num_hidden_layers != len(blocks) or _has_global_hooks():
        return False
    return all(map(_has_plain_projections, blocks)) and all(map(_is_untouched, modules_of(decoder)))


def _kind(module: nn.Module) -> str | None:
    """The name of the model that a module is of, as transformers defines it; None of any other module."""
    home = type(module).__module__
    return next((kind for kind in _WINDOWS if home == f"transformers.models.{kind}.modeling_{kind}"), None)


def _has_plain_projections(block: Any) -> bool:
    """True if all projections of a layer are linear modules."""
    attention, mlp = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
    found = [getattr(block.self_attn, name, None) for name in attention]
    found += [getattr(block.mlp, name, None) for name in mlp]
    return all(type(one) is nn.Linear for one in found)


def _is_untouched(module: nn.Module) -> bool:
    """True unless a module has hooks, or code of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module) and (_kind(module) is not None or _is_plain(module))


def _is_plain(module: nn.Module) -> bool:
    """True for modules of torch, and for activations of transformers, with plain parameters."""
    home = type(module).__module__
    is_known = home.startswith("torch.nn.modules.") or home == "transformers.activations"
    return is_known and all(type(one) is nn.Parameter for one in module._parameters.values() if one is not None)


def _rotation(adapter: Adapter) -> tuple:
    """A key of the functions that a model's code turns queries and keys with: they belong to no module."""
    home = vars(sys.modules[type(adapter.decoder).__module__])
    return tuple(weakref.ref(home[name]) for name in ("apply_rotary_pos_emb", "rotate_half") if name in home)


def _has_global_hooks() -> bool:
    return bool(module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)


def _project(module: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module.weight, module.bias)


def _allowed(dtype: torch.dtype) -> float:
    """Return the most that two passes may differ in a row, relative to the sum of both norms."""
    return (1.5 if dtype.itemsize < 4 else 64) * torch.finfo(dtype).eps
