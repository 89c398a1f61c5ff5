"""What one ordinary forward pass records: everything that the decomposition holds frozen (DESIGN.md section 2).

Prompts of different lengths go through the model as one packed sequence without padding: T positions in all, with
position ids that start over at every prompt and an attention function of our own that never looks past a prompt's
edges. That function also is where Q, K and the kind of mask are recorded; N² probabilities are never stored.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .adapters import Adapter

_ATTENTION_NAME = "depass_fast_recorder"


@dataclass
class AttentionTrace:
    """Frozen attention of one layer: q (T, H, d) and k (T, Hkv, d) after rotary embedding, and the mask's kind."""

    q: Tensor
    k: Tensor
    scale: float
    window: int | None = None  # a query sees the `window` last positions, itself included
    softcap: float | None = None


@dataclass
class LayerTrace:
    """What one layer recorded, in the model's dtype and on the layer's device."""

    resid_pre: Tensor  # (T, D) entering the layer
    resid_mid: Tensor  # (T, D) after its attention
    attention: AttentionTrace
    gate: Tensor  # (T, I) gate pre-activation
    act: Tensor  # (T, I) frozen activation: act(gate) · up, what the down projection reads


@dataclass(frozen=True)
class TraceSource:
    """Which model a trace was made by, and whether its weights have been written to since."""

    model: weakref.ref
    version: int

    @staticmethod
    def of(model: nn.Module) -> TraceSource:
        return TraceSource(weakref.ref(model), _version(model))

    def check(self, model: nn.Module) -> None:
        """Raises ValueError unless ``model`` is the one, as it was."""
        if self.model() is not model:
            raise ValueError("trace: it was made by another model; trace the prompt with this one.")
        if self.version != _version(model):
            raise ValueError("trace: the model's weights have changed since it was made; trace the prompt again.")


def _version(model: nn.Module) -> int:
    """Grows with every in-place change of a weight (inference tensors do not count them)."""
    return sum(0 if p.is_inference() else p._version for p in model.parameters())


@dataclass
class Trace:
    """One forward pass over P packed prompts of T positions in all.

    ``offsets`` (P + 1,) holds the first packed position of every prompt. ``resid_final`` (T, D) is the residual
    stream after the last layer, ``normed_final`` (T, D) the same after the final norm.
    """

    input_ids: Tensor
    offsets: np.ndarray
    layers: list[LayerTrace]
    resid_final: Tensor
    normed_final: Tensor
    source: TraceSource
    batch: bool = False  # made of a list of prompts, though it may hold but one

    @property
    def n_prompts(self) -> int:
        return len(self.offsets) - 1

    def span(self, prompt: int) -> slice:
        """The packed positions of one prompt."""
        return slice(int(self.offsets[prompt]), int(self.offsets[prompt + 1]))

    def length(self, prompt: int) -> int:
        return int(self.offsets[prompt + 1] - self.offsets[prompt])

    def resid(self, layer: int) -> Tensor:
        """The residual stream entering ``layer`` (T, D); after the last one for ``layer`` = number of layers."""
        return self.resid_final if layer == len(self.layers) else self.layers[layer].resid_pre

    def resid_at(self, layer: int, site: str) -> Tensor:
        """The residual stream at a site of ``layer``: `resid_pre`, `resid_mid` or `resid_post`. (T, D)."""
        return self.layers[layer].resid_mid if site == "resid_mid" else self.resid(layer + (site == "resid_post"))

    @property
    def nbytes(self) -> int:
        """Memory held by the trace, in bytes; grows with the number of positions, not with its square."""
        tensors = [self.input_ids, self.resid_final, self.normed_final]
        for layer in self.layers:
            tensors += [layer.resid_pre, layer.resid_mid, layer.attention.q, layer.attention.k, layer.gate, layer.act]
        return sum(t.numel() * t.element_size() for t in tensors)


def capture(adapter: Adapter, prompts: list[Tensor]) -> Trace:
    """Run the model once over ``prompts`` (ids, each (N,), N ≥ 1) and record what the decomposition freezes.

    The model is left as it was found, also after an exception or Ctrl-C: its attention implementation and hooks.

    Raises:
        FloatingPointError: weights or activations hold NaN or inf; the message names the layer.
        RuntimeError: the model's attention did not go through the recorder.
    """
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in prompts])]).astype(np.int64)
    recorder = _Recorder(adapter, offsets)
    input_ids = torch.cat(prompts).to(adapter.embedding.weight.device)
    position_ids = torch.cat([torch.arange(len(p)) for p in prompts]).to(input_ids.device)
    with torch.no_grad(), _recording(adapter, recorder):
        adapter.decoder(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False)
    trace = recorder.trace(input_ids)
    _check_finite(adapter, trace)
    return trace


class _Recorder:
    """Collects one forward pass; hooks and the attention function write into it."""

    def __init__(self, adapter: Adapter, offsets: np.ndarray) -> None:
        self.adapter, self.offsets = adapter, offsets
        self.implementation = adapter.config._attn_implementation  # the model's own, before ours takes its place
        self.layers: list[dict] = [{} for _ in range(adapter.n_layers)]
        self.final: dict[str, Tensor] = {}

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, **mask) -> Tensor:
        """Record Q and K, and attend within each prompt. q (1, H, T, d), k and v (1, Hkv, T, d) -> (1, T, H, d)."""
        rows = [x[0].transpose(0, 1).contiguous() for x in (q, k)]
        self.layers[module.layer_idx]["attention"] = AttentionTrace(*rows, scale=scale, **mask)
        out = torch.empty_like(q)
        for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            part = [x[:, :, start:stop] for x in (q, k, v)]
            out[:, :, start:stop] = _causal_attention(*part, scale=scale, **mask)
        return out.transpose(1, 2).contiguous()

    def trace(self, input_ids: Tensor) -> Trace:
        for index, record in enumerate(self.layers):
            missing = {"resid_pre", "resid_mid", "attention", "gate", "act"} - record.keys()
            if missing:
                raise RuntimeError(
                    f"layer {index}: the forward pass recorded no {', '.join(sorted(missing))}. The model's code does "
                    "not call these modules, or not through transformers' attention interface; supported: "
                    "transformers 4.51 to 5.x, models as transformers defines them."
                )
        layers = [LayerTrace(**record) for record in self.layers]
        return Trace(input_ids, self.offsets, layers, **self.final, source=TraceSource.of(self.adapter.model))


def _causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of one prompt with grouped heads; (1, H, N, d) -> (1, H, N, d)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    n = q.shape[2]
    if softcap is None and (window is None or window >= n):
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    mask = causal_mask(torch.arange(n, device=q.device), n, window)
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    logits = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def causal_mask(queries: Tensor, n_keys: int, window: int | None) -> Tensor:
    """Which of the first ``n_keys`` positions each query position sees: (Q,) -> (Q, n_keys) bool."""
    keys = torch.arange(n_keys, device=queries.device)
    mask = keys <= queries[:, None]
    return mask if window is None else mask & (keys > queries[:, None] - window)


_active = threading.local()
_one_at_a_time = threading.RLock()  # hooks and attention implementation belong to the model, not to a thread


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,  # built for an unpacked sequence, or not at all: ours is made of the offsets
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    recorder: _Recorder | None = getattr(_active, "recorder", None)
    if recorder is None:
        raise RuntimeError("this model is being traced by depass_fast in another thread; run it when that is done.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = recorder.adapter.window(sliding_window, recorder.implementation)
    return recorder.attend(module, query, key, value, scale=scale, window=window, softcap=softcap), None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION_NAME, _attention_function)


@contextmanager
def _recording(adapter: Adapter, recorder: _Recorder) -> Iterator[None]:
    """Hook the model up to ``recorder`` and undo all of it, whatever happens in between."""
    with _one_at_a_time, ExitStack() as undo:
        for index in range(adapter.n_layers):
            record = recorder.layers[index]
            undo.callback(_keep(adapter.module(index, "attention_norm"), recorder, record, "resid_pre", before=True))
            undo.callback(_keep(adapter.module(index, "mlp_norm"), recorder, record, "resid_mid", before=True))
            undo.callback(_keep(adapter.module(index, "gate_proj"), recorder, record, "gate"))
            undo.callback(_keep(adapter.module(index, "down_proj"), recorder, record, "act", before=True))
        undo.callback(_keep(adapter.final_norm_module, recorder, recorder.final, "resid_final", before=True))
        if adapter.dtype == torch.float64:
            for module, norm in _norms(adapter):
                undo.callback(module.register_forward_hook(_full_precision(norm)).remove)
        undo.callback(_keep(adapter.final_norm_module, recorder, recorder.final, "normed_final"))

        config = adapter.config
        previous = config._attn_implementation
        undo.callback(setattr, config, "_attn_implementation", previous)
        config._attn_implementation = _ATTENTION_NAME
        outer = getattr(_active, "recorder", None)
        undo.callback(setattr, _active, "recorder", outer)
        _active.recorder = recorder
        yield


def _keep(module: nn.Module, recorder: _Recorder, record: dict, name: str, before: bool = False) -> Callable[[], None]:
    """Record the input (``before``) or the output of ``module``, without the batch axis; returned is the way back."""

    def keep(x: Tensor) -> None:
        if getattr(_active, "recorder", None) is recorder:  # not what another thread runs meanwhile
            record[name] = x[0].detach()

    if before:
        return module.register_forward_pre_hook(lambda module, args: keep(args[0])).remove
    return module.register_forward_hook(lambda module, args, output: keep(output)).remove


def _norms(adapter: Adapter) -> Iterator[tuple[nn.Module, object]]:
    for index in range(adapter.n_layers):
        layer = adapter.layer(index)
        yield adapter.module(index, "attention_norm"), layer.attention.norm
        yield adapter.module(index, "mlp_norm"), layer.mlp.norm
    yield adapter.final_norm_module, adapter.final_norm()


def _full_precision(norm) -> object:
    """transformers computes norms in float32 even in a float64 model: that rounding would be all of the error."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        y = x * norm.scale(x)[..., None] * norm.weight
        return y if norm.bias is None else y + norm.bias

    return hook


def _check_finite(adapter: Adapter, trace: Trace) -> None:
    """Name the first layer at which NaN or inf appears, and the weight that holds it where one does."""
    if not _is_finite(trace.resid(0)):
        raise FloatingPointError("embedding: the hidden states entering layer 0 hold NaN or inf.")
    for index, layer in enumerate(trace.layers):
        recorded = (layer.attention.q, layer.attention.k, layer.gate, layer.act, trace.resid(index + 1))
        if _is_finite(*recorded):
            continue
        for name, parameter in adapter.blocks[index].named_parameters():
            if not _is_finite(parameter):
                name = f"{adapter.family.layers}.{index}.{name.removesuffix('.weight')}"
                raise FloatingPointError(f"layer {index}: the weights of {name} hold NaN or inf.")
        raise FloatingPointError(
            f"layer {index}: its activations hold NaN or inf on this prompt in {adapter.dtype}. "
            "Load the model in float32 or bfloat16 if they overflow."
        )
    if not _is_finite(trace.normed_final):
        raise FloatingPointError("final norm: its output holds NaN or inf.")


def _is_finite(*tensors: Tensor) -> bool:
    """Whether no element is NaN or inf; the maximum carries both, and is several times faster than `isfinite`."""
    device = tensors[0].device  # what enters the next layer may live elsewhere
    return bool(torch.stack([tensor.abs().amax().to(device) for tensor in tensors]).isfinite().all())
