"""The helpers of the published code, under their names: what scripts and its demo take from ``DePass.utils``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama import modeling_llama as llama

from ..adapters import adapt, unwrap
from ..inputs.prompts import Prompt, encode
from ..request import take_trace

scaled_dot_product_attention = functional.scaled_dot_product_attention
repeat_kv, rotate_half = llama.repeat_kv, llama.rotate_half


@torch.no_grad()
def from_states_to_probs(
    states: Tensor, lm_head: Callable[[Tensor], Tensor], tokenizer: Any, topk: int = 5
) -> list[tuple[int, str, float]]:
    """Return the ``topk`` likeliest next tokens after a normed state (D,): id, text and probability of each.

    Args:
        states: what ``lm_head`` reads, (D,); axes of length one before it are dropped.
        lm_head: the model's unembedding.
        tokenizer: anything with ``decode``.
        topk: at most the size of the vocabulary.

    Raises:
        ValueError: several states at once.
    """
    logits = lm_head(states)
    if logits.numel() != logits.shape[-1]:
        raise ValueError(f"states: expected one state (D,), got {tuple(states.shape)}.")
    best = logits.flatten().log_softmax(-1).topk(topk)
    found = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    return [(token, tokenizer.decode([token]), probability) for token, probability in found]


def get_rmsnorm_scaling(norm_layer: nn.Module, hidden_states: Tensor) -> Tensor:
    """Return γ ⊙ s of an RMSNorm, with s frozen at ``hidden_states`` (..., D): (..., D), in their dtype.

    s is computed in float32 at least; the published code squares in float16, where 256² is infinite and s zero.
    """
    norm: Any = norm_layer
    x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return (norm.weight.to(x) * scale).to(hidden_states.dtype)


def apply_rotary_pos_emb_llama(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Turn q and k (B, H, N, d) by tables (B, N, d) of their positions; ``position_ids`` is not read."""
    return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


def apply_rotary_pos_emb_qwen(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Turn q and k (B, H, N, d) by tables (positions, d), read at ``position_ids`` (B, N); None: at all of them."""
    cos, sin = (table[None] if position_ids is None else table[position_ids] for table in (cos, sin))
    return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


def compute_attention_weights_mha(
    state_norm: Tensor,
    attn_layer: nn.Module,
    layer_idx: int,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    apply_rotary_pos_emb: Callable[..., tuple[Tensor, Tensor]],
    model_name: str,
) -> Tensor:
    """Return the attention probabilities (B, H, N, N) of a Llama or Qwen2 attention for its input (B, N, D).

    Args:
        state_norm: what the attention reads.
        attn_layer: the attention; its rotary embedding is that of its config.
        layer_idx: not read.
        attn_mask: added to the logits, or where it is boolean, False shuts a key out; None: nothing.
        dropout_p: 0.
        is_causal: True shuts later keys out.
        apply_rotary_pos_emb: how to turn queries and keys by cos and sin, (B, N, d), or (N, d) for "qwen".
        model_name: "llama" or "qwen".

    Raises:
        ValueError: dropout; another kind of attention.
    """
    attention: Any = attn_layer
    if dropout_p:
        raise ValueError(f"dropout_p: {dropout_p} makes the probabilities random; give 0.")
    if not hasattr(attention, "q_proj") or hasattr(attention, "q_norm"):
        raise ValueError(f"attn_layer: a {type(attn_layer).__name__} is none of Llama's or Qwen2's kind.")
    q, k = (
        projection(state_norm).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    positions = torch.arange(q.shape[2], device=q.device)[None]
    cos, sin = llama.LlamaRotaryEmbedding(attention.config).to(q.device)(state_norm, positions)
    cos, sin = (cos[0], sin[0]) if model_name == "qwen" else (cos, sin)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    logits = q @ repeat_kv(k, q.shape[1] // k.shape[1]).transpose(-2, -1) * attention.head_dim**-0.5
    if is_causal:
        logits = logits.masked_fill(~torch.ones_like(logits[0, 0], dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1)


def capture_sdpa() -> tuple[Callable[..., Tensor], Callable[[], tuple[list, list, list]]]:
    """Return a stand-in for torch's attention, and a function that returns what it was called with.

    That is the mask, the dropout and the causality of every call, in three lists.
    """
    calls: list[tuple[Tensor | None, float, bool]] = []

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        calls.append((attn_mask, dropout_p, is_causal))
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)

    return attention, lambda: ([c[0] for c in calls], [c[1] for c in calls], [c[2] for c in calls])


@contextmanager
def hook_manager(model: nn.Module) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Any]]]:
    """Watch a model's layers: their inputs, the residual stream after their attention, and their outputs, by layer."""
    before: dict[int, Tensor] = {}
    between: dict[int, Tensor] = {}
    after: dict[int, Any] = {}
    adapter, handles = adapt(unwrap(model, None)[0]), []

    def watch(index: int) -> None:
        block, attention = adapter.block(index), adapter.module(index, "attention")

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            before[index] = args[0] if args else kwargs["hidden_states"]

        def attend(module: nn.Module, args: tuple, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            between[index] = before[index].to(out.device) + out

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            after[index] = output

        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(attention.register_forward_hook(attend))
        handles.append(block.register_forward_hook(leave))

    try:
        for index in range(adapter.n_layers):
            watch(index)
        yield before, between, after
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def get_stream_from_prompt(
    tokenizer: Any, model: nn.Module, prompt: Prompt
) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
    """Return the residual stream of one forward pass, in tensors (1, N, D).

    They are: before and after every attention and, last, before the final norm (2 L + 1 tensors); those after the
    attentions alone (L); those that enter the layers, and the normed last one (L + 1).
    """
    inner, inner_tokenizer = unwrap(model, tokenizer)
    adapter = adapt(inner)
    trace = take_trace(adapter, [encode(prompt, adapter, inner_tokenizer)], progress=False)
    entering = [layer.resid_pre[None] for layer in trace.layers]
    between = [layer.resid_mid[None] for layer in trace.layers]
    stream = [x for pair in zip(entering, between, strict=True) for x in pair] + [trace.resid_final[None]]
    return stream, between, (*entering, trace.normed_final[None])
