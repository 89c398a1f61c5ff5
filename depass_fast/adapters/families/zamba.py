"""Zamba: Mamba-1 in every layer, with groups of channels that each have projections of their own to dt, B and C.

In some layers a transformer block stands in front of it, one for all of them, as in Zamba 2.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import silu

from ..family import Family, HeadScale, Mixer
from ..mixer_activation import value_ratio
from ..recurrent import selective_scan_of_heads, wide, with_mixer
from ..shared_block import SharedBlock, with_shared_blocks

MODEL_TYPES = ("zamba",)


def declare(config: Any) -> Family:
    def mamba(below: str, streams: SharedBlock) -> Family:
        home = f"{below}mamba"
        layer = Family(attention_norm=f"{below}input_layernorm", mlp=None, mlp_norm=None, streams=streams)
        mixer = Mixer(
            ("in_proj",),
            lambda mixer, outputs, convolve: selective_scan_of_heads(mixer, outputs[0][:, ::2], convolve),
            f"{home}.conv1d",
            value_ratio=value_ratio(config.hidden_mamba_act),
        )
        scale = HeadScale(("in_proj",), lambda mixer, outputs, y: silu(wide(outputs[0][:, 1::2])))
        return with_mixer(layer, home, 1, mixer, scale, v_proj=f"{home}.in_proj", v_part=_values)

    return with_shared_blocks(
        config.layers_block_type,
        mamba,
        "shared_transf",
        lambda mlp, number: {"gate_proj": f"{mlp}.gate_proj", "up_proj": f"{mlp}.up_proj"},
    )


def _values(weight: Tensor) -> Tensor:
    """The values' outputs of the projection, each of which is followed by its gate."""
    return weight[::2]
