"""The published DePass algorithm, written plainly: the baseline that the library is measured against.

Hong et al., arXiv 2510.18462, with the behaviour of its released implementation, defects included
(`tests/bench/test_published.py` holds it to that implementation's numbers). It keeps the published costs: every
component at every position, a per-head OV tensor (M, N, H, D), whole gate tensors (M, N, I). It is not slowed down:
probabilities are computed once, products are einsums, elementwise steps are in place, and the gates stay (M, N, I),
which saves the published transposes.

For Llama and Qwen2 models loaded with ``attn_implementation="eager"``. States are (M, N, D) inside and (N, M, D) when
returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.models import Model

Rule = Literal["softmax", "linear", "relu", "max", "taylor"]

MEMORY = 40 << 30  # bytes that a published run may hold at once; it is cut into groups to fit


def groups_for(heads: int, hidden: int, width: int, components: int, length: int, itemsize: int) -> int:
    """The number of groups that a published run must be cut into to stay within ``MEMORY``."""
    row = 2 * heads * hidden + 5 * width + 4 * hidden
    return max(1, -(-components * length * row * itemsize // MEMORY))


@dataclass
class Record:
    """One forward pass, per layer: residuals (N, D), probabilities (H, N, N), gate and up (N, I)."""

    x_pre: list[Tensor] = field(default_factory=list)
    x_mid: list[Tensor] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)
    gate: list[Tensor] = field(default_factory=list)
    up: list[Tensor] = field(default_factory=list)
    x_final: list[Tensor] = field(default_factory=list)

    def x(self, layer: int) -> Tensor:
        """The residual stream entering ``layer``; after the last one for ``layer`` = number of layers."""
        return self.x_pre[layer] if layer < len(self.x_pre) else self.x_final[0]


class Published:
    """The published method on a loaded model.

    Args:
        model: a Llama or Qwen2 causal language model with eager attention, in evaluation mode.
        rule: how a neuron is shared out; ``temperature`` is the softmax's.
        ignore_special: keep component 0 out of the shares of token components, except at position 0.
        corrected: leave out the two deviations from the mathematics, overridden gates and a residual that does not fit
            the neurons. It is for verification; the arithmetic stays the same.
    """

    def __init__(
        self,
        model: Model,
        rule: Rule = "softmax",
        temperature: float = 0.1,
        ignore_special: bool = True,
        corrected: bool = False,
    ) -> None:
        if model.config._attn_implementation != "eager":
            raise ValueError("model: load it with attn_implementation='eager', which returns the probabilities.")
        self.model, self.layers, self.norm = model, model.model.layers, model.model.norm
        self.rule, self.temperature = rule, temperature
        self.ignore_special, self.corrected = ignore_special, corrected

    # -- decompositions -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def tokens(self, ids: Tensor, layer: int = 0, end: int | None = None, groups: int = 1) -> Tensor:
        """Tokens entering ``layer``, carried to the final norm, or to the input of layer ``end``: (N, N, D).

        The published implementation cuts the tokens into ``groups`` where memory is short; that changes the result.
        """
        record = self.record(ids)
        x, parts = record.x(layer), []
        for group in torch.arange(len(x), device=x.device).chunk(groups):
            special = self.ignore_special and bool(group[0])  # goes along, so that it can be kept out
            state = self._diagonal(x, torch.cat([group[:1] * 0, group]) if special else group)
            state = self._propagate(state, record, layer, end, self.ignore_special)
            parts.append((self._normed(state, record) if end is None else state)[int(special) : -1])
        return torch.cat(parts).transpose(0, 1)

    @torch.no_grad()
    def all_layers(self, ids: Tensor) -> Tensor:
        """Tokens at the input of every layer and after the last, without the final norm: (L + 1, N, N, D)."""
        record = self.record(ids)
        state = self._diagonal(record.x(0))
        states = [state.clone(), *self._states(state, record, 0, None, self.ignore_special)]
        return torch.stack([s[:-1].transpose(0, 1) for s in states])

    @torch.no_grad()
    def neurons(self, ids: Tensor, layer: int, groups: int = 1) -> Tensor:
        """The residual (as published: that before the MLP), then every neuron of ``layer``: (N, 1 + I, D).

        ``groups`` as in :meth:`tokens`.
        """
        record = self.record(ids)
        mlp = self.layers[layer].mlp
        act = mlp.act_fn(record.gate[layer]) * record.up[layer]
        total, parts = record.x(layer + 1) if self.corrected else record.x_mid[layer], []
        for numbers, vectors in zip(act.T.chunk(groups), mlp.down_proj.weight.T.chunk(groups), strict=True):
            neurons = numbers[:, :, None] * vectors[:, None]  # (I', N, D)
            state = torch.cat([(total - neurons.sum(0))[None], neurons])
            del neurons
            parts.append(self._finish(state, record, layer + 1)[:, min(len(parts), 1) :])
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def module(self, ids: Tensor, layer: int, kind: Literal["attn", "mlp", "attn_head"]) -> Tensor:
        """The residual, then one module's output, or every head's, of ``layer``: (N, M, D)."""
        record = self.record(ids)
        pre, mid, post = record.x_pre[layer], record.x_mid[layer], record.x(layer + 1)
        if kind == "mlp":
            return self._finish(torch.stack([mid, post - mid]), record, layer + 1)
        if kind == "attn":
            state = torch.stack([pre, mid - pre])
        else:
            heads = torch.einsum("hqk,mkhe->hqe", record.probabilities[layer], self._ov(pre[None].clone(), pre, layer))
            state = torch.cat([pre[None], heads])
        return self._finish(self._mlp(state, record, layer, False), record, layer + 1)

    @torch.no_grad()
    def subspace(self, ids: Tensor, layer: int, state: Tensor) -> Tensor:
        """A given state (M, N, D) after ``layer``, carried to the final norm: (N, M, D)."""
        return self._finish(state.clone(), self.record(ids), layer + 1)

    @torch.no_grad()
    def subspace_all_layers(self, ids: Tensor, layer: int, state: Tensor) -> Tensor:
        """A given state (M, N, D) after ``layer``, at the output of every later layer, without norm: (L', N, M, D)."""
        states = self._states(state.clone(), self.record(ids), layer + 1, None, False)
        return torch.stack([s.transpose(0, 1) for s in states])

    def score(self, state: Tensor, position: int, token: int) -> Tensor:
        """The share of every component (M,) in the logit of ``token``, of a state (N, M, D)."""
        return state[position] @ self.model.lm_head.weight[token]

    # -- one forward pass ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def record(self, ids: Tensor) -> Record:
        record = Record()
        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(_kept(layer.input_layernorm, record.x_pre, entering=True))
                hooks.enter_context(_kept(layer.post_attention_layernorm, record.x_mid, entering=True))
                hooks.enter_context(_kept(layer.mlp.gate_proj, record.gate))
                hooks.enter_context(_kept(layer.mlp.up_proj, record.up))
            hooks.enter_context(_kept(self.norm, record.x_final, entering=True))
            output = self.model.model(ids[None], use_cache=False, output_attentions=True)
        record.probabilities = [p[0] for p in output.attentions]
        return record

    # -- propagation --------------------------------------------------------------------------------------------

    def _states(
        self, state: Tensor, record: Record, layer: int, end: int | None, ignore_special: bool
    ) -> Iterator[Tensor]:
        """Copies of the state after every layer from ``layer`` to ``end``."""
        for index in range(layer, len(self.layers) if end is None else end):
            state = self._mlp(self._attention(state, record, index), record, index, ignore_special)
            yield state.clone()

    def _propagate(self, state: Tensor, record: Record, layer: int, end: int | None, ignore_special: bool) -> Tensor:
        for index in range(layer, len(self.layers) if end is None else end):
            state = self._mlp(self._attention(state, record, index), record, index, ignore_special)
        return state

    def _finish(self, state: Tensor, record: Record, layer: int) -> Tensor:
        state = self._propagate(state, record, layer, None, False)
        return self._normed(state, record).transpose(0, 1)

    def _normed(self, state: Tensor, record: Record) -> Tensor:
        return state * _scale(self.norm, record.x_final[0])

    def _attention(self, state: Tensor, record: Record, layer: int) -> Tensor:
        ov = self._ov(state, record.x_pre[layer], layer)
        state += torch.einsum("hqk,mkhe->mqe", record.probabilities[layer], ov)
        return state

    def _ov(self, state: Tensor, x: Tensor, layer: int) -> Tensor:
        """The output of every component of every key through every head: (M, N, H, D). V biases are dropped."""
        attention, config = self.layers[layer].self_attn, self.model.config
        n_heads, n_kv, d = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        normed = state * _scale(self.layers[layer].input_layernorm, x)
        values = torch.einsum("mne,hde->mndh", normed, attention.v_proj.weight.unflatten(0, (n_kv, d)))
        values = values.repeat_interleave(n_heads // n_kv, dim=-1)
        return torch.einsum("mndh,ehd->mnhe", values, attention.o_proj.weight.unflatten(1, (n_heads, d)))

    def _mlp(self, state: Tensor, record: Record, layer: int, ignore_special: bool) -> Tensor:
        mlp, gate, up = self.layers[layer].mlp, record.gate[layer], record.up[layer]
        g = (state * _scale(self.layers[layer].post_attention_layernorm, record.x_mid[layer])) @ mlp.gate_proj.weight.T
        if self.rule == "taylor":
            contribution = g.mul_(mlp.act_fn(gate) / (gate + 1e-8) * up)
        else:
            mask = self._prepare(g, ignore_special)
            contribution = self._shares(g, mask).mul_(mlp.act_fn(gate) * up)
        state += contribution @ mlp.down_proj.weight.T
        return state

    def _prepare(self, g: Tensor, ignore_special: bool) -> Tensor:
        """Override gates (M, N, I) in place, the published way, and return the mask of those that take part."""
        if ignore_special:
            home = g[0, 0].clone()
            g[0] = 0
            g[0, 0] = home
        if not self.corrected:
            g[0, 0] = 1.0
            last = g[-1]
            last[last.abs() < 1e-5] = 0
        mask = g != 0
        nobody = ~mask.any(0)
        g[-1][nobody] = 1.0
        mask[-1] |= nobody
        return mask

    def _shares(self, g: Tensor, mask: Tensor) -> Tensor:
        """Shares (M, N, I) over the components, in the memory of ``g`` where the rule allows."""
        if self.rule == "softmax":
            g.masked_fill_(~mask, -torch.inf).div_(self.temperature)
            return torch.softmax(g, dim=0).mul_(mask)
        if self.rule == "max":
            best = g.masked_fill_(~mask, -torch.inf).argmax(0, keepdim=True)
            return torch.zeros_like(g).scatter_(0, best, 1.0)
        if self.rule == "linear":
            # finfo.min overflows: with anyone masked, all shares of two or more others become zero
            g.masked_fill_(~mask, torch.finfo(g.dtype).min)
            g = torch.relu_(g - g.amin(0)).mul_(mask)
            return g / (g.sum(0) + 1e-6)
        if self.rule == "relu":
            g.relu_()
            return g / (g.sum(0) + 1e-6)
        raise ValueError(f"rule: {self.rule!r} is not one of softmax, linear, relu, max, taylor.")

    def _diagonal(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """States of some or all tokens of (N, D): each is x[m] at its position m. The last one holds the remainder."""
        tokens = torch.arange(len(x), device=x.device) if tokens is None else tokens
        state = x.new_zeros(len(tokens) + 1, len(x), x.shape[1])
        state[torch.arange(len(tokens), device=x.device), tokens] = x[tokens]
        state[-1] = x - state.sum(0)
        return state


def _scale(norm: Any, x: Tensor) -> Tensor:
    """γ ⊙ s with s frozen: (N, D)."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight


@contextmanager
def _kept(module: nn.Module, record: list[Tensor], entering: bool = False) -> Iterator[None]:
    """Append the input or output of ``module`` to ``record``, without the batch axis."""
    if entering:
        handle = module.register_forward_pre_hook(lambda module, args: record.append(args[0][0]))
    else:
        handle = module.register_forward_hook(lambda module, args, output: record.append(output[0]))
    try:
        yield
    finally:
        handle.remove()
