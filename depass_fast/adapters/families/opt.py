"""OPT: LayerNorm, learned positions, ReLU. The 350m normalises the stream itself, and has narrower embeddings."""

from typing import Any

from ..family import Family, Observed, read_plain

MODEL_TYPES = ("opt",)


def declare(config: Any) -> Family:
    before = config.do_layer_norm_before
    narrow = config.word_embed_proj_dim != config.hidden_size
    return Family(
        layers="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm" if before and not config._remove_final_layer_norm else None,
        project_out="model.decoder.project_out" if narrow else None,
        norm="layer",
        attention_norm="self_attn_layer_norm" if before else None,
        attention_stream_norm=None if before else "self_attn_layer_norm",
        o_proj="self_attn.out_proj",
        observed=Observed(("q_proj", "k_proj", "v_proj"), read_plain),
        mlp="fc1",
        mlp_norm="final_layer_norm" if before else None,
        mlp_stream_norm=None if before else "final_layer_norm",
        gate_proj="fc1",
        up_proj=None,
        down_proj="fc2",
    )
