"""Every token is labelled by its piece, with its space; labels of different ids differ, and lead back to the id."""

import re
import warnings

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from depass_fast import DePass, InputWarning, Tokens
from depass_fast.inputs.token_texts import single_token, token_texts, token_with_text
from tests.support.family_models import build_model
from tests.support.plans import assert_same
from tests.support.tokenizers import byte_level, llama_like

JAPANESE = " 東京タワー"  # a space and fifteen bytes


def model(vocabulary: int) -> torch.nn.Module:
    return build_model("llama", num_key_value_heads=2, vocab_size=vocabulary)


def test_sentencepiece_keeps_its_spaces():
    tokenizer = llama_like()
    dp = DePass(model(len(tokenizer)), tokenizer)
    result = dp.attribute("The capital of France is", Tokens(), " Paris")
    assert "".join(result.tokens) == "<s> The capital of France is"
    assert result.labels[1:4] == ["' The'@1", "' capital'@2", "' of'@3"] and result.target_names == ["' Paris'"]
    word, part = tokenizer.convert_tokens_to_ids(["▁is", "is"])
    assert token_texts([word, part], tokenizer) == [" is", "is"]
    assert dp.attribute([1, part, word], Tokens()).labels == ["'<s>'@0", "'is'@1", "' is'@2"]
    assert dp.attribute([1, part], Tokens(), [part, word]).target_names == ["'is'", "' is'"]
    texts = token_texts(tokenizer.encode(" 東ä\t", add_special_tokens=False), tokenizer)
    assert texts == [" ", " ", "東", "<0xC3>", "<0xA4>", "\t"]  # the tokenizer's own space first


@pytest.mark.parametrize("words", [(), ("ー",), ("ワー", "東", " \u6771")])
def test_bytes_that_are_no_characters_are_written_as_such(words):
    tokenizer = byte_level(*words, " capital")
    ids = tokenizer.encode(JAPANESE, add_special_tokens=False)
    texts = token_texts(ids, tokenizer)
    assert len(set(texts)) == len(set(ids)) and not any("\ufffd" in text for text in texts)
    raw = [re.split(r"(<0x..>)", text) for text in texts]
    parts = [bytes([int(p[3:5], 16)]) if p.startswith("<0x") else p.encode() for text in raw for p in text]
    assert b"".join(parts).decode() == JAPANESE
    assert token_texts(tokenizer.encode(" capital"), tokenizer) == [" capital"]
    if not words:
        assert texts[:4] == [" ", "<0xE6>", "<0x9D>", "<0xB1>"]


def test_three_targets_have_three_names():
    tokenizer = byte_level()
    dp = DePass(model(len(tokenizer)), tokenizer)
    ids = tokenizer.encode("東", add_special_tokens=False)
    result = dp.attribute(ids, Tokens(), ids)
    assert result.target_names == ["'<0xE6>'", "'<0x9D>'", "'<0xB1>'"]
    assert result.labels == ["'<0xE6>'@0", "'<0x9D>'@1", "'<0xB1>'@2"]
    assert dp.attribute(ids, Tokens(), ["<0xE6>", "<0x9D>"]).target_ids == ids[:2]


@pytest.mark.parametrize("make", [llama_like, lambda: byte_level(" capital", "ワー", " \u6771", pad_token="<pad>")])
def test_every_label_leads_back_to_its_id(make):
    tokenizer = make()
    texts = token_texts(range(len(tokenizer)), tokenizer)
    assert len(set(texts)) == len(tokenizer)
    assert [token_with_text(text, tokenizer) for text in texts] == list(range(len(tokenizer)))


def test_labels_of_the_demo_model(demo):
    tokenizer = demo.tokenizer
    texts = token_texts(range(len(tokenizer)), tokenizer)
    assert len(set(texts)) == len(tokenizer)
    decoded = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in range(len(tokenizer))]
    assert all(new == old or "\ufffd" in old for new, old in zip(texts, decoded, strict=True))
    prompt = "Nyria Morstam speaks"
    which = demo.attribute(prompt, Tokens()).labels[1:3]
    assert demo.focus(prompt, Tokens(), which).labels == which


def test_ids_without_a_token_and_words_that_end():
    tokenizer = byte_level()
    assert token_texts([300, 301], tokenizer) == ["<id 300>", "<id 301>"]
    assert token_texts(torch.tensor([5, 6]), None) == ["5", "6"]
    backend = Tokenizer(models.BPE(vocab={"a": 0, "a</w>": 1}, merges=[], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    old = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_texts([0, 1], old) == ["a", "a "] and token_with_text("a ", old) == 1

    class Bare:  # such as tiktoken's inside other people's code
        def convert_ids_to_tokens(self, i):
            return {0: b"\xe6\x9d", 1: b" is", 2: "<unk>"}.get(i, "<unk>")

        unk_token, unk_token_id = "<unk>", 2

        def decode(self, ids, **_):
            return "<unk>"

    assert token_texts([0, 1, 2, 3], Bare()) == ["<0xE6><0x9D>", " is", "<unk>", "<id 3>"]


def test_a_string_of_one_token():
    """Llama 2's tokenizer puts a space before a text: 'Paris' is one token, and ' Paris' is its text."""
    tokenizer = llama_like()
    paris = tokenizer.convert_tokens_to_ids("▁Paris")
    assert len(tokenizer.encode(" Paris", add_special_tokens=False)) == 2
    assert single_token("Paris", tokenizer) == single_token(" Paris", tokenizer) == paris
    with pytest.raises(
        ValueError, match=r"target: ' Parisi' is 3 tokens: \[' ' \(\d+\), ' Paris' \(\d+\), 'i' \(\d+\)\]"
    ):
        single_token(" Parisi", tokenizer)
    with pytest.raises(ValueError, match=r"one is needed\. 'Paris' is one token\. Several tokens"):
        single_token("  Paris ", byte_level("Paris"))
    with pytest.raises(
        ValueError, match=r"'capital' is 7 tokens: .*one is needed\. ' capital' is one token\. Several tokens"
    ):
        single_token("capital", byte_level(" capital"))
    with pytest.raises(
        ValueError, match=r"'\\n' is 2 tokens: .*one is needed\. '<0x0A>' is one token\. Several tokens"
    ):
        single_token("\n", tokenizer)
    assert tokenizer.convert_ids_to_tokens(single_token("<0x0A>", tokenizer)) == "<0x0A>"
    with pytest.raises(ValueError, match=r"one is needed\. Several tokens"):
        single_token("capital", byte_level())


def test_a_text_that_is_the_label_of_another_token():
    """Llama 2's tokenizer reads 'is' as '▁is', and has an 'is' without a space."""
    tokenizer = llama_like()
    with_space, without = tokenizer.convert_tokens_to_ids(["▁is", "is"])
    expected = rf"contrast: 'is' by itself is the token ' is' \(id {with_space}\) .* 'is' is another \(id {without}\)"
    with pytest.warns(InputWarning, match=expected):
        assert single_token("is", tokenizer, "contrast") == with_space
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert single_token(" is", tokenizer) == with_space
        single_token("Paris", tokenizer)
        single_token(" Paris", byte_level(" Paris", "Paris"))


def test_a_target_beyond_the_models_vocabulary():
    tokenizer = byte_level(" Paris")
    last = len(tokenizer) - 1
    dp = DePass(model(last), tokenizer)
    expected = rf"' Paris' is the tokenizer's id {last}, outside the model's vocabulary \(0 to {last - 1}\)"
    for given in ({"target": " Paris"}, {"target": ["a", " Paris"]}, {"target": "a", "contrast": " Paris"}):
        with pytest.raises(ValueError, match=expected):
            dp.attribute("a", Tokens(), **given)


def test_arrays_of_strings():
    tokenizer = llama_like()
    dp = DePass(model(len(tokenizer)), tokenizer)
    texts = ["The capital", "France is Paris"]
    expected = dp.attribute(texts, Tokens(), " Paris")
    for array in (np.array(texts), np.array(texts, dtype=object)):
        for result, oracle in zip(dp.attribute(array, Tokens(), np.array(" Paris")), expected, strict=True):
            assert result.labels == oracle.labels and torch.equal(result.scores, oracle.scores)
    assert len(dp.attribute(np.array(texts[:1]), Tokens())) == 1
    assert dp.attribute(np.array(texts[0]), Tokens()).labels == expected[0].labels
    assert dp.trace(np.array(texts)).n_prompts == 2
    assert_same(dp.plan(np.array(texts), Tokens(), measure=False), dp.plan(texts, Tokens(), measure=False))
    names = dp.attribute(texts[0], Tokens(), np.array([" Paris", " is"])).target_names
    assert names == ["' Paris'", "' is'"]
