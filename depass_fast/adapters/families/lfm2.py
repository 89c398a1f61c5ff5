"""LFM2: most layers mix positions by a short convolution alone, with a gate on either side; then MLP or mixture."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.functional import silu

from ..family import Experts, Family, HeadScale, Mixer, third
from ..recurrence import Recurrence
from ..recurrent import wide

MODEL_TYPES = ("lfm2", "lfm2_moe")


def declare(config: Any) -> Family:
    experts = None
    if config.model_type == "lfm2_moe":
        home = "feed_forward"
        experts = Experts(top_k=config.num_experts_per_tok, router=f"{home}.gate", experts=f"{home}.experts")
    full = Family(
        final_norm="model.embedding_norm",
        attention_norm="operator_norm",
        o_proj="self_attn.out_proj",
        mlp="feed_forward",
        mlp_norm="ffn_norm",
        gate_proj="feed_forward.w1",
        up_proj="feed_forward.w3",
        down_proj="feed_forward.w2",
        act_fn=None,
        curve=silu,
        experts=experts,
    )
    short = replace(
        full,
        attention="conv",
        mixer=Mixer(("in_proj",), _read, "conv.conv"),
        head_scale=HeadScale(("in_proj",), lambda conv, outputs, heads: wide(outputs[0].chunk(3, -1)[1])),
        v_proj="conv.in_proj",
        v_part=third(2),
        o_proj="conv.out_proj",
        value_dim=config.hidden_size,
        key_dim=1,
        q_norm=None,
        k_norm=None,
    )
    return replace(full, kinds=tuple(short if kind == "conv" else full for kind in config.layer_types))


def _read(conv: Any, outputs: list[Tensor], convolve: Callable[..., Tensor]) -> Recurrence:
    """No recurrence: one head gives its values as the convolution left them."""
    gate = wide(outputs[0].chunk(3, -1)[0])
    q, k, decay = (gate.new_zeros(len(gate), 1, 1) for _ in range(3))
    return Recurrence(q, k, decay, skip=gate.new_ones(1), in_ratio=gate)
