"""What the engine needs to know of a model, and how a family declares it.

A family is data: where its modules live and of which kind they are. Nothing here runs a model, and nothing
outside this package knows a module's name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from operator import attrgetter

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Norm:
    """A normalisation with its scale frozen (DESIGN.md section 2): ``y = weight ⊙ x · s + bias``.

    ``s[n] = 1 / sqrt(mean(x[n]²) + eps)``; ``weight`` and ``bias`` are (D,), ``bias`` may be absent.
    """

    weight: Tensor
    eps: float
    bias: Tensor | None = None

    def to(self, device: torch.device) -> Norm:
        """The same norm on another device."""
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def scale(self, x: Tensor) -> Tensor:
        """The frozen factor s of hidden states ``x`` (..., D) -> (...), in float32 or wider."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.rsqrt(x.square().mean(-1) + self.eps)


@dataclass(frozen=True)
class Attention:
    """The OV path of one layer. ``w_v`` is (Hkv·d, D), ``w_o`` is (D, H·d); biases (Hkv·d,) and (D,) or None."""

    norm: Norm
    w_v: Tensor
    w_o: Tensor
    b_v: Tensor | None
    b_o: Tensor | None
    n_heads: int
    n_kv_heads: int
    head_dim: int

    def constant(self, dtype: torch.dtype) -> Tensor | None:
        """What every position receives whatever its components are, (D,) or None; the rows of P sum to one."""
        value = _affine(self.w_v, self.norm.bias, self.b_v, dtype)
        if value is not None:
            groups = self.n_heads // self.n_kv_heads
            value = value.view(self.n_kv_heads, 1, self.head_dim).expand(-1, groups, -1).reshape(-1)
        return _affine(self.w_o, value, self.b_o, dtype)


@dataclass(frozen=True)
class Mlp:
    """The MLP of one layer. ``w_gate`` is (I, D), ``w_down`` is (D, I); biases (I,) and (D,) or None."""

    norm: Norm
    w_gate: Tensor
    w_down: Tensor
    b_gate: Tensor | None
    b_down: Tensor | None

    def gate_constant(self, dtype: torch.dtype) -> Tensor | None:
        """What the `bias` component drives every gate with besides its own state, (I,), or None."""
        return _affine(self.w_gate, self.norm.bias, self.b_gate, dtype)

    def constant(self, dtype: torch.dtype) -> Tensor | None:
        """The constant that the MLP adds to the residual stream, (D,), or None."""
        return None if self.b_down is None else self.b_down.to(dtype)


@dataclass(frozen=True)
class Layer:
    """Everything of one layer that propagates components."""

    attention: Attention
    mlp: Mlp

    @property
    def device(self) -> torch.device:
        return self.attention.w_v.device

    @property
    def has_attention_bias(self) -> bool:
        return any(b is not None for b in (self.attention.norm.bias, self.attention.b_v, self.attention.b_o))

    @property
    def has_mlp_bias(self) -> bool:
        return any(b is not None for b in (self.mlp.norm.bias, self.mlp.b_gate, self.mlp.b_down))


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its parts: paths below the model and below a layer."""

    model_types: tuple[str, ...]
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    unembedding: str = "lm_head"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    v_proj: str = "self_attn.v_proj"
    o_proj: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate_proj: str = "mlp.gate_proj"
    up_proj: str = "mlp.up_proj"
    down_proj: str = "mlp.down_proj"


@dataclass(frozen=True)
class Adapter:
    """A model seen through its family's declaration."""

    model: nn.Module
    family: Family
    drop_biases: bool = field(default=False)

    @property
    def config(self):
        return self.model.config

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        return self.unembedding.weight.shape[1]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.get_submodule(self.family.layers)

    @property
    def decoder(self) -> nn.Module:
        """The model without its unembedding."""
        return self.model.base_model

    @property
    def embedding(self) -> nn.Module:
        return self.model.get_submodule(self.family.embedding)

    @property
    def unembedding(self) -> nn.Module:
        return self.model.get_submodule(self.family.unembedding)

    @property
    def final_norm_module(self) -> nn.Module:
        return self.model.get_submodule(self.family.final_norm)

    @property
    def context_length(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model begins; `device_map` may put later layers elsewhere."""
        return self.embedding.weight.device

    @property
    def unembedding_bias(self) -> Tensor | None:
        return self._bias(self.unembedding)

    def window(self, announced: int | None, implementation: str | None) -> int | None:
        """The sliding window of the model's own mask, given what a layer announces and the attention implementation.

        Before transformers made masks per layer, eager and sdpa masks applied the configured window to every layer,
        whatever the layer announced; flash attention never did.
        """
        one_mask_for_all = hasattr(self.decoder, "_update_causal_mask")
        if one_mask_for_all and "flash" not in (implementation or "eager"):
            return getattr(self.config, "sliding_window", None)
        return announced

    def module(self, index: int, part: str) -> nn.Module:
        """The module that the family calls ``part`` in layer ``index``."""
        layers = attrgetter(self.family.layers)(self.model)  # much cheaper than get_submodule, which checks every step
        return attrgetter(getattr(self.family, part))(layers._modules[str(index)])

    def without_biases(self) -> Adapter:
        """The same model with its additive constants left out of the propagation (not out of the forward pass)."""
        return replace(self, drop_biases=True)

    def final_norm(self) -> Norm:
        return self._norm(self.final_norm_module)

    def layer(self, index: int) -> Layer:
        """The weights of layer ``index``: references to the model's own tensors, in (out, in) layout."""
        module = self.module(index, "attention")
        v_proj, o_proj = self.module(index, "v_proj"), self.module(index, "o_proj")
        gate, down = self.module(index, "gate_proj"), self.module(index, "down_proj")
        head_dim = int(module.head_dim)
        attention = Attention(
            norm=self._norm(self.module(index, "attention_norm")),
            w_v=v_proj.weight,
            w_o=o_proj.weight,
            b_v=self._bias(v_proj),
            b_o=self._bias(o_proj),
            n_heads=o_proj.weight.shape[1] // head_dim,
            n_kv_heads=v_proj.weight.shape[0] // head_dim,
            head_dim=head_dim,
        )
        mlp = Mlp(
            norm=self._norm(self.module(index, "mlp_norm")),
            w_gate=gate.weight,
            w_down=down.weight,
            b_gate=self._bias(gate),
            b_down=self._bias(down),
        )
        return Layer(attention, mlp)

    def named_weights(self, index: int) -> dict[str, nn.Module]:
        """The modules of layer ``index`` whose weights the propagation reads, by their name below the model."""
        parts = ("attention_norm", "v_proj", "o_proj", "mlp_norm", "gate_proj", "up_proj", "down_proj")
        prefix = f"{self.family.layers}.{index}"
        return {f"{prefix}.{getattr(self.family, part)}": self.module(index, part) for part in parts}

    def _norm(self, module: nn.Module) -> Norm:
        eps = getattr(module, "variance_epsilon", None)
        return Norm(module.weight, float(module.eps if eps is None else eps), self._bias(module))

    def _bias(self, module: nn.Module) -> Tensor | None:
        return None if self.drop_biases else getattr(module, "bias", None)


def _affine(weight: Tensor, x: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``weight @ x + bias`` where either may be absent; None where both are."""
    value = None if x is None else weight.to(dtype) @ x.to(dtype)
    if bias is None:
        return value
    return bias.to(dtype) if value is None else value + bias.to(dtype)
