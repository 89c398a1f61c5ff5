"""Gemma 1, 2 and 3, VaultGemma: norms that store γ - 1, a scaled embedding, GeGLU.

From Gemma 2 on there are norms on the outputs (not in VaultGemma), and local and global layers. Gemma 2 caps attention
and final logits. A Gemma 3 that also sees is decomposed in its language model.
"""

from typing import Any

from ..family import Family

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "gemma3", "vaultgemma")


def declare(config: Any) -> Family:
    if config.model_type == "gemma":
        return Family(norm_offset=1.0)
    homes = ("model.language_model", "language_model.model") if config.model_type == "gemma3" else ("model",)
    outputs: dict[str, Any] = {}
    if config.model_type != "vaultgemma":
        outputs["attention_output_norm"] = "post_attention_layernorm"
        outputs["mlp_output_norm"] = "post_feedforward_layernorm"
    return Family(
        decoder=homes,
        layers=tuple(f"{home}.layers" for home in homes),
        embedding=tuple(f"{home}.embed_tokens" for home in homes),
        final_norm=tuple(f"{home}.norm" for home in homes),
        unembedding=("lm_head", "language_model.lm_head"),
        logit_cap=getattr(config.get_text_config(), "final_logit_softcapping", None),
        norm_offset=1.0,
        layer_windows=True,
        mlp_norm="pre_feedforward_layernorm",
        **outputs,
    )
