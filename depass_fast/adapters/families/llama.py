"""Llama's layout: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

Mistral adds a sliding window, which the attention call announces. Qwen 2 has biases on Q, K and V, Qwen 3 norms on Q
and K. Both end in the frozen attention probabilities, and only V's bias is propagated. Q and K alone are also concerned
by SmolLM 3's layers without rotary embedding, HunYuan's norms, the windows of Ministral and CWM, and Ministral 3's
factor of Q at late positions. transformers runs InternLM 3 and IQuest-Coder as Llamas. Emu 3's text model is one, too.
"""

from typing import Any

from ..family import Family

MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "ministral", "seed_oss", "helium", "hunyuan_v1_dense"),
    *("ministral3", "cwm", "ernie4_5", "internlm3", "iquestcoder", "emu3_text_model"),
)


def declare(config: Any) -> Family:
    return Family(qk_norm_last=config.model_type == "hunyuan_v1_dense")
