"""Llama: RMSNorm, grouped-query attention, SwiGLU. Biases exist where `attention_bias` or `mlp_bias` is set."""

from .base import Family

FAMILY = Family(model_types=("llama",))
