"""MiMo V2 Flash: DeepSeek 3's mixtures without a shared expert, scaled values, and windows with sinks in most layers.

Heads of values are narrower than those of queries and keys. Layers with a window have twice as many KV heads, and only
these layers have sinks.
"""

from typing import Any

from torch import Tensor

from ..family import Experts, Family

MODEL_TYPES = ("mimo_v2_flash",)


def declare(config: Any) -> Family:
    scale = config.attention_value_scale

    def scaled(weight: Tensor) -> Tensor:
        return weight * scale  # of V's projection, and of its bias

    return Family(
        v_part=None if scale in (None, 1.0) else scaled,
        value_dim=config.v_head_dim,
        key_dim=config.head_dim,
        sinks=True,
        experts=Experts(top_k=config.num_experts_per_tok),
    )
