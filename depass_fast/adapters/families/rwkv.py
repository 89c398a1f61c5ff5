"""RWKV-4: both branches of a layer read a mixture of two positions, and what they give is gated by the receptance.

Every channel of time mixing is a head of width one; channel mixing is an ungated MLP. In eval mode the model halves its
residual stream behind every few layers, and its weights, once it has run, accordingly.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..family import Family, HeadScale, Mixer
from ..recurrence import Recurrence
from ..recurrent import wide, with_mixer, wkv

MODEL_TYPES = ("rwkv",)


def declare(config: Any) -> Family:
    gate = HeadScale(("receptance",), lambda module, outputs, y: torch.sigmoid(wide(outputs[0])))
    family = Family(
        layers="rwkv.blocks",
        embedding="rwkv.embeddings",
        final_norm="rwkv.ln_out",
        unembedding="head",
        norm="layer",
        attention_norm="ln1",
        attention_shift="attention.time_mix_value",
        mlp="feed_forward",
        mlp_norm="ln2",
        mlp_shift="feed_forward.time_mix_key",
        mlp_scale=gate,
        gate_proj="feed_forward.key",
        up_proj=None,
        down_proj="feed_forward.value",
        act_fn=None,
        curve=_squared_relu,
    )
    family = with_mixer(family, "attention", 1, Mixer(("key",), _read), gate, v_proj="attention.value")
    family, every = replace(family, o_proj="attention.output"), config.rescale_every
    halved = replace(family, mlp_keeps=0.5)
    kinds = (halved if every > 0 and (i + 1) % every == 0 else family for i in range(config.num_hidden_layers))
    return replace(family, kinds=tuple(kinds))


def _read(mixer: Any, outputs: list[Tensor], convolve: Callable[..., Tensor]) -> Recurrence:
    k = wide(outputs[0])
    return wkv(k, wide(mixer.time_decay).exp().to(k), wide(mixer.time_first).to(k))


def _squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x).square()
