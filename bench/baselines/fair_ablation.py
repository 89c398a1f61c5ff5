"""Ablation as fast as it can be made without an approximation: the baseline that a speed-up has to be measured against.

The numbers are those of one forward pass per neuron, to rounding. Five savings make it fast. The layers up to the
neuron's run once, for all neurons of all layers. The ablated MLP does not run again: its output changes by a multiple
of one column of W_down. Variants go through the later layers in batches. The last layer computes keys and values
everywhere, but queries and MLP at the read position only. One logit is read. Keys and values of the prefix cannot be
shared: the neuron is ablated at every position, so every position of every variant differs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from ..core.models import Model
from ..core.timing import synchronise

FAMILIES = ("llama", "qwen2")


@dataclass
class Clean:
    """The unablated forward pass: per layer the activations (N, I) and the residual stream after it (N, D)."""

    activations: list[Tensor]
    after: list[Tensor]
    rotary: tuple[Tensor, Tensor]  # cos and sin, (N, d) each
    direction: Tensor  # (D,)
    logit: Tensor


class FairAblation:
    """Batched ablation of MLP neurons, read at the last position.

    Args:
        model: a Llama or Qwen2 in evaluation mode; another family is a ValueError.
        batch: how many neurons are ablated at once; :meth:`best_batch` finds the fastest.
    """

    def __init__(self, model: Model, batch: int = 32) -> None:
        if model.config.model_type not in FAMILIES:
            raise ValueError(f"model: {model.config.model_type!r} is not one of {', '.join(FAMILIES)}.")
        self.model, self.layers, self.batch = model, model.model.layers, batch

    @torch.no_grad()
    def effects(
        self, ids: Tensor, target: int, layers: Sequence[int], values: Tensor, neurons: Iterable[int] | None = None
    ) -> Tensor:
        """logit - logit with one neuron's activation set to ``values`` (L, I) at all positions: (len(layers), I).

        ``neurons`` limits the work to these of every layer.
        """
        clean, effects = self.clean(ids, target), []
        for layer in layers:
            which = torch.arange(values.shape[1], device=ids.device)
            which = which if neurons is None else which[list(neurons)]
            logits = [self._logits(clean, layer, values[layer], part) for part in which.split(self.batch)]
            effects.append(clean.logit - torch.cat(logits))
        return torch.stack(effects)

    @torch.no_grad()
    def best_batch(
        self, ids: Tensor, target: int, layer: int = 0, grid: Sequence[int] = (8, 16, 32, 64, 128, 256, 512)
    ) -> dict[int, float]:
        """Try batch sizes on a sample of a layer's neurons, keep the fastest, and return the neurons/s of those tried.

        The search ends when two sizes in a row are slower than the best, or when memory runs out.
        """
        width = self.layers[layer].mlp.down_proj.in_features
        values, rates = torch.zeros(len(self.layers), width, device=ids.device), {}
        clean = self.clean(ids, target)
        for batch in (size for size in grid if size <= width):
            best = max(rates.values(), default=0.0)
            if len(rates) > 2 and max(list(rates.values())[-2:]) < best:
                break
            parts = torch.arange(min(width, max(batch, 128)), device=ids.device).split(batch)
            try:
                self._logits(clean, layer, values[layer], parts[0])
                synchronise()
                began = time.perf_counter()
                for part in parts:
                    self._logits(clean, layer, values[layer], part)
                synchronise()
            except torch.OutOfMemoryError:
                break
            rates[batch] = sum(map(len, parts)) / (time.perf_counter() - began)
        if rates:
            self.batch = max(rates, key=rates.__getitem__)
        return rates

    def clean(self, ids: Tensor, target: int) -> Clean:
        """One forward pass of ids (N,)."""
        hidden = self.model.model.embed_tokens(ids[None])
        cos, sin = self.model.model.rotary_emb(hidden, torch.arange(len(ids), device=ids.device)[None])
        clean = Clean([], [], (cos[0], sin[0]), self.model.lm_head.weight[target], hidden.new_zeros(()))
        for index in range(len(self.layers)):
            hidden = self._attention(hidden, index, clean.rotary)
            act = self._activations(hidden, index)
            hidden = hidden + self.layers[index].mlp.down_proj(act)
            clean.activations.append(act[0])
            clean.after.append(hidden[0])
        clean.logit = self._logit(hidden[:, -1], clean)[0]
        return clean

    def _logits(self, clean: Clean, layer: int, values: Tensor, neurons: Tensor) -> Tensor:
        """The logit (B,) with each of ``neurons`` (B,) ablated."""
        last = len(self.layers) - 1
        read = slice(-1, None) if layer == last else slice(None)
        change = values[neurons].to(clean.after[0]) - clean.activations[layer][read][:, neurons]  # (N, B)
        columns = self.layers[layer].mlp.down_proj.weight[:, neurons]  # (D, B)
        hidden = torch.addcmul(clean.after[layer][read], change.T[..., None], columns.T[:, None])  # (B, N, D)
        for index in range(layer + 1, len(self.layers)):
            hidden = self._attention(hidden, index, clean.rotary, only_last=index == last)
            hidden = hidden + self.layers[index].mlp.down_proj(self._activations(hidden, index))
        return self._logit(hidden[:, -1], clean)

    def _logit(self, hidden: Tensor, clean: Clean) -> Tensor:
        # differences of logits would drown in the rounding of half precision
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return _normed(hidden, self.model.model.norm).to(wide) @ clean.direction.to(wide)

    def _attention(self, hidden: Tensor, index: int, rotary: tuple[Tensor, Tensor], only_last: bool = False) -> Tensor:
        """The residual stream after the attention of a layer, at all positions or at the last one."""
        block = self.layers[index].self_attn
        read = slice(-1, None) if only_last else slice(None)
        normed = _normed(hidden, self.layers[index].input_layernorm)
        heads = (-1, block.head_dim)
        q = block.q_proj(normed[:, read]).unflatten(-1, heads).transpose(1, 2)
        k = block.k_proj(normed).unflatten(-1, heads).transpose(1, 2)
        v = block.v_proj(normed).unflatten(-1, heads).transpose(1, 2)
        cos, sin = rotary
        q = q * cos[read] + rotate_half(q) * sin[read]
        k = k * cos + rotate_half(k) * sin
        if groups := q.shape[1] // k.shape[1] - 1:
            k, v = (x.repeat_interleave(groups + 1, dim=1) for x in (k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=not only_last, scale=block.scaling)
        return hidden[:, read] + block.o_proj(out.transpose(1, 2).flatten(2))

    def _activations(self, hidden: Tensor, index: int) -> Tensor:
        mlp = self.layers[index].mlp
        normed = _normed(hidden, self.layers[index].post_attention_layernorm)
        return mlp.act_fn(mlp.gate_proj(normed)).mul_(mlp.up_proj(normed))


def _normed(x: Tensor, norm: Any) -> Tensor:
    return nn.functional.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)
