"""The reasons why causal language models of transformers are not supported, by the `model_type` of their configs.

A family that has a file is supported, whatever stands here. `docs/families.md` lists all types with these reasons, and
the message that refuses a model has them, too.
"""

from __future__ import annotations

_ENCODER = "bidirectional encoder: it looks ahead, or its head has an activation and a norm"
_DECODER = "encoder-decoder: its decoder reads an encoder"

REASONS: dict[str, str] = {
    **dict.fromkeys(
        (
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
            *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta"),
            *("xlm-roberta-xl", "xmod"),
        ),
        _ENCODER,
    ),
    **dict.fromkeys(
        (
            *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus"),
            *("plbart", "prophetnet", "trocr", "whisper", "musicgen", "musicgen_melody"),
        ),
        _DECODER,
    ),
    "dots3_note": "a text model beside encoders of images and of sound; its text model, dots3_note_text, runs",
    "inkling2_text": "branches that read a mixture of the streams of earlier blocks, and convolutions behind them",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "its attention reads keys and values of another model"
    ),
    "blt": "a model of bytes whose layers attend from patches to bytes and back",
    "cpmant": "it looks ahead within a prefix, with a learned bias of positions",
    "hrm_text": "a stack of layers that runs several times",
    "reformer": "attention by hashing, in reversible layers with two residual streams",
    "xlnet": "attention over permutations with two streams: it looks ahead",
}
