"""Models that see or hear, too, and whose text model is one of another family: they are decomposed on text.

Fuyu contains a Persimmon, GOT-OCR 2 a Qwen 2, MOSS Transcribe Diarize a Qwen 3, and Emu 3 a Llama.
`AutoModelForCausalLM` loads the Llama of an Emu 3 alone.
"""

from dataclasses import replace
from typing import Any

from ..family import Family
from . import llama, persimmon

MODEL_TYPES = ("fuyu", "got_ocr2", "moss_transcribe_diarize", "emu3")


def declare(config: Any) -> Family:
    text = config.get_text_config()
    known = next((file for file in (llama, persimmon) if text.model_type in file.MODEL_TYPES), None)
    if known is None:
        raise ValueError(f"model: its text model is a {text.model_type!r}, which is not supported in this place.")
    homes = ("model.language_model", "model.text_model", "language_model.model")
    family = known.declare(text)
    return replace(
        family,
        decoder=homes,
        layers=tuple(f"{home}.layers" for home in homes),
        embedding=tuple(f"{home}.embed_tokens" for home in homes),
        final_norm=tuple(f"{home}.{str(family.final_norm).removeprefix('model.')}" for home in homes),
        unembedding=("lm_head", "language_model.lm_head"),
    )
