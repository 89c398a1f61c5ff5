"""BitNet: Llama's layout with a norm in front of the output projection and one in front of the down projection.

The weights are the master weights; layers that round them in every forward pass are refused.
"""

from typing import Any

import torch
from torch import Tensor

from ..family import Family, HeadScale
from ..recurrent import wide

MODEL_TYPES = ("bitnet",)


def declare(config: Any) -> Family:
    return Family(head_scale=HeadScale((), _norm), mlp_inner_norm="mlp.ffn_sub_norm")


def _norm(attention: Any, outputs: list[Tensor], heads: Tensor) -> Tensor:
    norm, y = attention.attn_sub_norm, wide(heads)
    scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return (scale * wide(norm.weight)).to(heads.dtype)
