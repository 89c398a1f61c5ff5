"""Tokenizers built by hand: one as Llama 2's (SentencePiece, with bytes), and a byte-level one."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_SPECIAL = ("<unk>", "<s>", "</s>")
_WORDS = ("▁The", "▁capital", "▁of", "▁France", "▁is", "is", "▁Paris", "▁", "P", "a", "r", "i", "s", "東", "京", "\t")


def llama_like() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before every text, writes spaces as `▁`, and unknown characters as bytes."""
    pieces = [(token, 0.0) for token in _SPECIAL] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(word, -float(10 - len(word))) for word in _WORDS]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(*words: str, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the 256 bytes and of ``words``, each of which is one token; ``special`` are its own."""
    reader = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in words:
        written = "".join(piece for piece, _ in reader.pre_tokenize_str(word))
        for end in range(2, len(written) + 1):
            pair = (written[: end - 1], written[end - 1])
            if written[:end] not in vocabulary:
                vocabulary[written[:end]] = len(vocabulary)
                merges.append(pair)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer, backend.decoder = reader, decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in dict.fromkeys(special.values())])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
