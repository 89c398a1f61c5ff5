"""Llama 3.2 Vision, on text: a Llama among whose layers stand others with cross-attention, which images alone wake.

Without an image the model skips these. They are no layers here: those that run are counted from 0 without gaps.
"""

from typing import Any

from ..family import Family

MODEL_TYPES = ("mllama", "mllama_text_model")


def declare(config: Any) -> Family:
    text = config.get_text_config()
    homes = ("model.language_model", "language_model.model", "model")  # with images beside the text, or of text alone
    return Family(
        decoder=homes,
        layers=tuple(f"{home}.layers" for home in homes),
        homes=tuple(n for n in range(text.num_hidden_layers) if n not in text.cross_attention_layers),
        embedding=tuple(f"{home}.embed_tokens" for home in homes),
        final_norm=tuple(f"{home}.norm" for home in homes),
        unembedding=("lm_head", "language_model.lm_head"),
    )
