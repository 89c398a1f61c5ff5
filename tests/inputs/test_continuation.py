"""The boundary of prompt and continuation: the prompt's ids stay, nothing is added, what merges is said."""

import warnings

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from depass_fast import TokenBoundaryWarning
from depass_fast.inputs.continuation import encode_continued
from tests.support.models import build

PIECES = ["<s>", "</s>", "<unk>", "▁", "▁The", "▁capital", "▁is", "▁Par", "▁Paris", "is", "Paris", "Par", "▁P"]


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space in front of every text, as Llama 2's does, and a BOS."""
    letters = sorted({c for piece in PIECES[3:] for c in piece} | {"\n", "."})
    scores = [(piece, -1.0) for piece in PIECES] + [(c, -8.0) for c in letters if c not in PIECES]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def continued(prompt, continuation, tokenizer):
    (ids,), (length,) = encode_continued(prompt, continuation, build("llama-gqa").adapter, tokenizer)[1:]
    return tokenizer.convert_ids_to_tokens(ids.tolist()), length


def test_the_prefix_space_is_not_added_twice(sentencepiece):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens, length = continued("The capital is", " Paris", sentencepiece)
        assert (tokens, length) == (["▁The", "▁capital", "▁is", "▁Paris"], 3)
        ids = sentencepiece.encode("The capital is")
        assert continued(ids, " Paris", sentencepiece)[0] == tokens  # ids in the prompt's place
        assert continued({"input_ids": torch.tensor([ids])}, " Paris", sentencepiece)[0] == tokens
        assert continued("The capital is", "Paris", sentencepiece)[0][3:] == ["Paris"]


def test_a_prompt_that_would_change_keeps_its_tokens_and_says_so(sentencepiece):
    with pytest.warns(TokenBoundaryWarning, match="prompt and 'is' as one text are other tokens"):
        tokens, length = continued("The Par", "is", sentencepiece)
    assert (tokens, length) == (["▁The", "▁Par", "is"], 2)


def test_ids_without_a_text_that_gives_them_are_not_compared(sentencepiece):
    """The letters are other tokens in the text that they decode to: nothing is known of the boundary."""
    ids = sentencepiece.convert_tokens_to_ids(["▁The", "P", "a", "r"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert continued(ids, " Paris", sentencepiece)[0] == ["▁The", "P", "a", "r", "▁Paris"]


def test_chat_messages_are_continued(demo):
    messages = [{"role": "user", "content": "Nyria Morstam speaks"}]
    batch, (ids,), (length,) = encode_continued(messages, " Italian", demo.adapter, demo.tokenizer)
    assert not batch and length < len(ids)
    assert demo.tokenizer.decode(ids[length:]) == " Italian"


def test_prompts_have_one_text_or_one_each(demo):
    prompts = ["Nyria Morstam speaks", "Diane met"]
    batch, ids, lengths = encode_continued(prompts, " Italian", demo.adapter, demo.tokenizer)
    assert batch and [demo.tokenizer.decode(one[n:]) for one, n in zip(ids, lengths, strict=True)] == [" Italian"] * 2
    _, ids, lengths = encode_continued(prompts, [" Italian", " Grace"], demo.adapter, demo.tokenizer)
    assert demo.tokenizer.decode(ids[1][lengths[1] :]) == " Grace"
    with pytest.raises(ValueError, match=r"one per prompt \(2\), got a list of 1; a prompt that has several"):
        encode_continued(prompts, [" Italian"], demo.adapter, demo.tokenizer)
    with pytest.raises(ValueError, match="continuation: empty"):
        encode_continued(prompts, "", demo.adapter, demo.tokenizer)
