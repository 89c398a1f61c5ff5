"""Llama 4: most layers attend within chunks, the others without rotary embedding; a router weighs what experts read."""

from typing import Any

from torch import Tensor

from ..family import Experts, Family

MODEL_TYPES = ("llama4_text", "llama4")


def declare(config: Any) -> Family:
    text = config.get_text_config()
    top_k, home = text.num_experts_per_tok, "feed_forward"
    chunk = text.attention_chunk_size
    homes = ("language_model.model", "model")  # with images beside the text, or of text alone
    return Family(
        decoder=homes,
        layers=tuple(f"{one}.layers" for one in homes),
        embedding=tuple(f"{one}.embed_tokens" for one in homes),
        final_norm=tuple(f"{one}.norm" for one in homes),
        unembedding=("lm_head", "language_model.lm_head"),
        q_norm="self_attn.qk_norm",
        k_norm="self_attn.qk_norm",
        qk_norm_last=True,
        window=tuple(chunk if kind == "chunked_attention" else None for kind in text.layer_types),
        chunked=True,
        counts_positions=bool(text.attn_temperature_tuning) and not all(text.no_rope_layers),
        mlp=home,
        gate_proj=f"{home}.gate_proj",
        up_proj=f"{home}.up_proj",
        down_proj=f"{home}.down_proj",
        act_fn=f"{home}.activation_fn",
        experts=Experts(
            top_k=top_k,
            router=f"{home}.router",
            experts=f"{home}.experts",
            transposed=True,
            act_fn=("act_fn", "activation_fn"),
            decide=lambda layer, returned: _top_k(returned, top_k),
            shared=f"{home}.shared_expert",
            weighs_input=True,
        ),
    )


def _top_k(returned: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Choose by the logits; the scores of experts that are not chosen are zero."""
    scores, logits = returned
    chosen = logits.topk(k, dim=-1).indices
    return scores.gather(1, chosen), chosen
