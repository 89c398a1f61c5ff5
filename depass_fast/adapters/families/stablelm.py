"""StableLM: Llama's layout with LayerNorm and partial rotary embedding; the 12B is parallel."""

from typing import Any

from ..family import Family, Observed, read_rotary

MODEL_TYPES = ("stablelm",)


def declare(config: Any) -> Family:
    parallel = config.use_parallel_residual
    return Family(
        norm="layer",
        parallel=parallel,
        observed=Observed(("q_proj", "k_proj", "v_proj"), read_rotary),
        mlp_norm="input_layernorm" if parallel else "post_attention_layernorm",
    )
