"""xLSTM: mLSTM in the place of attention, then a gated MLP.

A LayerNorm of every head stands behind mLSTM, which its mean passes: it is taken off the values instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..family import Family, HeadScale, Mixer, first_half, second_half
from ..recurrence import Recurrence
from ..recurrent import centred_by_head, mlstm, norm_of_centred, wide, with_mixer

MODEL_TYPES = ("xlstm",)


def declare(config: Any) -> Family:
    if config.mode != "inference":
        raise ValueError(f"model: its mode is {config.mode!r}, whose chunks are whole; set config.mode = 'inference'.")
    home, heads, fused = "mlstm_layer", config.num_heads, config.weight_mode == "fused"
    keys, inner = (int(config.hidden_size * factor) for factor in (config.qk_dim_factor, config.v_dim_factor))
    mlp: dict[str, Any] = {"gate_proj": "ffn.proj_up_gate", "up_proj": "ffn.proj_up"}
    if fused:
        mlp = {**dict.fromkeys(mlp, "ffn.proj_up_gate_z"), "gate_part": first_half, "up_part": second_half}
    names = ("qkv_opreact", "ifgate_preact") if fused else ("q", "k", "igate_preact", "fgate_preact")

    def read(mixer: Any, outputs: list[Tensor], convolve: Callable[..., Tensor]) -> Recurrence:
        given = wide(torch.cat(outputs, -1))  # q and k come first, the gates last
        q, k = given[:, : 2 * keys].unflatten(-1, (2, heads, -1)).unbind(1)
        return mlstm(q, k, given[:, -2 * heads :], config.gate_soft_cap, config.eps)

    def gate(outputs: list[Tensor]) -> Tensor:
        return torch.sigmoid(wide(outputs[0][:, -inner:]))

    behind = HeadScale(
        ("qkv_opreact" if fused else "ogate_preact",),
        lambda mixer, outputs, y: gate(outputs) * norm_of_centred(mixer.multihead_norm, heads, y),
        lambda mixer, outputs: gate(outputs) * mixer.multihead_norm.bias if config.use_bias else None,
    )
    family = Family(
        layers="backbone.blocks",
        embedding="backbone.embeddings",
        final_norm="backbone.out_norm",
        with_cache=True,
        logit_cap=config.output_logit_soft_cap,
        attention_norm="norm_mlstm",
        mlp="ffn",
        mlp_norm="norm_ffn",
        down_proj="ffn.proj_down",
        act_fn="ffn.act_fn",
        **mlp,
    )
    of_v = slice(2 * keys, 2 * keys + inner) if fused else slice(None)
    values: dict[str, Any] = {"v_proj": f"{home}.{'qkv_opreact' if fused else 'v'}", "key_dim": keys // heads}
    values["v_part"] = lambda weight: centred_by_head(weight[of_v], heads)
    return with_mixer(family, home, inner // heads, Mixer(names, read), behind, **values)
