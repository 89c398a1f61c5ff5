"""GPT-NeoX and Pythia: LayerNorm, partial rotary embedding, QKV interleaved by head, attention and MLP in parallel."""

from typing import Any

from ..family import Family, of_each_head

MODEL_TYPES = ("gpt_neox",)


def declare(config: Any) -> Family:
    return Family(
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        unembedding=("lm_head", "embed_out"),
        norm="layer",
        parallel=config.use_parallel_residual,
        attention="attention",
        v_proj="attention.query_key_value",
        v_part=of_each_head(config.num_attention_heads, 3, 2),
        o_proj="attention.dense",
        gate_proj="mlp.dense_h_to_4h",
        down_proj="mlp.dense_4h_to_h",
    )
