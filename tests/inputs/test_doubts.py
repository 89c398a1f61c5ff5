"""Input that is probably not what was meant is warned of: padding without a mask, two start tokens, an end."""

import warnings

import pytest
import torch
from tokenizers import AddedToken, processors

from depass_fast import Contrast, DePass, Heads, InputWarning, LogProb, Tokens
from tests.support.family_models import build_model
from tests.support.tokenizers import byte_level, llama_like


def with_model(tokenizer):
    return DePass(
        build_model("llama", num_key_value_heads=2, vocab_size=len(tokenizer)), tokenizer, exclude_special=False
    )


@pytest.fixture(scope="module")
def padded():
    """A tokenizer with a token for padding alone."""
    return with_model(byte_level(bos_token="<s>", eos_token="</s>", pad_token="<pad>"))


@pytest.fixture(scope="module")
def shared():
    """A tokenizer as GPT-2's: one token for everything."""
    return with_model(byte_level(**dict.fromkeys(["bos_token", "eos_token", "unk_token", "pad_token"], "<|end|>")))


@pytest.fixture(scope="module")
def llama():
    return with_model(llama_like())


def quiet(dp, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dp.attribute(dp.trace(prompt), Tokens())


def test_padding_without_a_mask(padded):
    pad = padded.tokenizer.pad_token_id
    for prompt in ([pad, 5, 6], [5, 6, pad], torch.tensor([[5, 6, 7], [5, pad, pad]]), {"input_ids": [[pad, 5, 6]]}):
        for call in (lambda p: padded.attribute(p, Tokens()), padded.trace):
            with pytest.warns(InputWarning, match=rf"padding token \(id {pad}\), and no mask says that it is padding"):
                call(prompt)
    quiet(padded, {"input_ids": [[pad, 5, 6]], "attention_mask": [[0, 1, 1]]})
    quiet(padded, {"input_ids": [[pad, 5, 6]], "attention_mask": [[1, 1, 1]]})  # it says so itself
    quiet(padded, [5, pad, 6])


def test_one_token_for_padding_and_for_the_ends(shared):
    """A single one is a start or an end of a text; several are padding."""
    end = shared.tokenizer.pad_token_id
    for prompt in ([end, 5, 6], [5, 6, end], [end, 5, end], "<|end|>ab", {"input_ids": [end, 5]}, [end]):
        quiet(shared, prompt)
    for prompt in ([end, end, 5], [5, end, end]):
        with pytest.warns(InputWarning, match="padding token") as caught:
            shared.attribute(prompt, Tokens())
        assert len(caught) == 1


def test_two_start_tokens(llama):
    ids = llama.tokenizer.encode("The capital")
    quiet(llama, "The capital")
    quiet(llama, ids)
    with pytest.warns(InputWarning, match=r"start token twice \(id 1\).* leave it out of the text"):
        llama.attribute("<s>The capital", Tokens())
    for prompt in ([1, *ids], {"input_ids": [1, *ids], "attention_mask": [1] * (len(ids) + 1)}):
        with pytest.warns(InputWarning, match=r"start token twice .* add_special_tokens=False"):
            llama.attribute(prompt, Tokens())
    llama.tokenizer.chat_template = "<s><s>{{ messages[0]['content'] }}"
    with pytest.warns(InputWarning, match="The tokenizer's chat template adds one too many"):
        llama.attribute([{"role": "user", "content": "is"}], Tokens())


def test_generated_ids_are_not_doubted_again(padded):
    with pytest.warns(InputWarning) as caught:
        padded.attribute_generation([padded.tokenizer.pad_token_id, 5], max_new_tokens=2)
    assert len(caught) == 1


def test_a_tokenizer_that_ends_the_text(padded):
    tokenizer = byte_level(eos_token="</s>")
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    dp = DePass(padded.model, tokenizer, exclude_special=False)
    with pytest.warns(InputWarning, match="the tokenizer ends the text with '</s>'"):
        dp.attribute("ab", Tokens())
    quiet(dp, [5, end])
    quiet(with_model(byte_level(eos_token="</s>")), "ab</s>")


def test_start_and_padding_of_a_continuation(llama, padded, shared):
    ids = llama.tokenizer.encode("The capital")
    for continuation in ([1, 5], "<s>The", [[1, 5]]):
        with pytest.warns(InputWarning, match=r"continuation: it begins with the start token \(id 1\), .*=False"):
            llama.attribute([ids], Tokens(), continuation=continuation)
    pad, end = padded.tokenizer.pad_token_id, shared.tokenizer.pad_token_id
    for dp, continuation in ((padded, [5, pad]), (padded, [pad, 5]), (shared, [5, end, end])):
        with pytest.warns(InputWarning, match=r"continuation: .*padding: it is decomposed like text. Give ids without"):
            dp.attribute([5, 6], Tokens(), continuation=continuation)
    with pytest.warns(InputWarning, match="continuation: it begins with the start token"):
        shared.attribute([5, 6], Tokens(), continuation=[end, 5])
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        llama.attribute(ids, Tokens(), continuation=ids[1:])
        shared.attribute([5, 6], Tokens(), continuation=[5, end])
        shared.attribute([5, 6], Tokens(), continuation=[end])


def said(dp, call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(DePass(dp.model, dp.tokenizer))
    return [str(one.message) for one in caught if issubclass(one.category, InputWarning)]


def test_a_first_token_that_is_a_word(shared, llama):
    """By default it is kept out of the allocation, which is for a start token."""
    word, start = [5, 6, 7], [shared.tokenizer.bos_token_id, 5, 6]
    told = [
        lambda dp: dp.attribute(word, Tokens()),
        lambda dp: dp.attribute([start, word], Tokens(1)),
        lambda dp: dp.attribute(word, Tokens(), continuation=[8]),
        lambda dp: dp.attribute_generation(word, max_new_tokens=1),
        lambda dp: dp.decompose(word, Tokens()),
        lambda dp: dp.focus(word, Tokens(), 1),
        lambda dp: dp.explain_attention(word, Tokens(), 1),
        lambda dp: dp.partition(word, Tokens()),
        lambda dp: dp.start(dp.trace(word), Tokens()),
        lambda dp: dp.attention_credit(word, Tokens(), allocation="softmax"),
        lambda dp: dp.attribute(word, Tokens(), position=1),
    ]
    for call in told:
        assert len([text for text in said(shared, call) if "begins with no start token" in text]) == 1
    untold = [
        lambda dp: dp.attribute(start, Tokens()),
        lambda dp: dp.attribute(word, Tokens(), exclude_special=False),
        lambda dp: dp.attribute(word, Tokens(), exclude_special=[0]),
        lambda dp: dp.attribute(word, Tokens(), allocation="shapley"),
        lambda dp: dp.attribute(word, Heads(0)),
        lambda dp: dp.attribute(word[:1], Tokens()),
        lambda dp: dp.ledger(word),
        lambda dp: dp.head_weights(word, 0),
        lambda dp: dp.explain_attention(word, Tokens(), 0),
        lambda dp: dp.decompose(word, Tokens(), end=0),
        lambda dp: dp.decompose(word, Tokens(1), end=1),
        lambda dp: dp.attribute(word, Tokens(), position=0),
        lambda dp: dp.attention_credit(word, Tokens()),
        lambda dp: DePass(dp.model).attribute(word, Tokens()),
    ]
    for call in untold:
        assert not said(shared, call)


def test_where_no_mlp_shares_out_what_it_writes():
    tokenizer = byte_level(bos_token="<s>")
    dp = DePass(build_model("mamba", vocab_size=len(tokenizer)), tokenizer)
    assert not said(dp, lambda dp: dp.attribute([5, 6, 7], Tokens()))


@pytest.mark.parametrize(
    "target", ["b", LogProb("b"), Contrast("b", " a"), ("b", " a"), [" a", "b"]], ids=lambda target: str(target)
)
def test_a_target_without_its_space(target):
    """A word behind a word is another token."""
    dp = with_model(byte_level(" a", " b"))
    found = said(dp, lambda dp: dp.attribute("a", Tokens(), target, allocation="shapley"))
    assert len(found) == 1 and found[0].startswith("target: 'b' has no space in front of it")
    for prompt, one in (("a ", "b"), ("a(", "b"), ("a", " b"), ("a", "."), ("a=", "b"), ("a.", "b"), ("是", "b")):
        assert not said(dp, lambda dp, p=prompt, t=one: dp.attribute(p, Tokens(), t, allocation="shapley"))


def test_a_space_that_is_told_once():
    dp = with_model(byte_level(" a", " b"))
    found = said(dp, lambda dp: dp.attribute(["a", "aa", "a"], Tokens(), "b", allocation="shapley"))
    assert len(found) == 1
    found = said(dp, lambda dp: dp.attribute(["a", "a"], Tokens(), targets=["b", " b"], allocation="shapley"))
    assert len(found) == 1


def test_scripts_without_spaces_and_numbers_have_none():
    dp = with_model(byte_level(" 巴", "巴", "是", " 2"))
    for prompt, one in (("是", "巴"), ("a", "巴"), ("1", "2")):
        assert not said(dp, lambda dp, p=prompt, t=one: dp.attribute(p, Tokens(), t, allocation="shapley"))
    assert said(dp, lambda dp: dp.attribute("a", Tokens(), "2", allocation="shapley"))


def test_a_text_that_is_read_with_its_space(llama):
    """With SentencePiece's space in front both texts are one token."""
    tokenizer = llama.tokenizer
    word = next(t for t in ("The", "capital") if len(tokenizer.encode(t, add_special_tokens=False)) == 1)
    assert not [
        text
        for text in said(llama, lambda dp: dp.attribute("The capital", Tokens(), word, allocation="shapley"))
        if "has no space" in text
    ]


def test_tokens_of_a_template_are_no_words():
    tokenizer = byte_level(" a", " b", bos_token="<s>")
    tokenizer.add_tokens([AddedToken("<|assistant|>", special=True), AddedToken("[END", special=True), "word"])
    dp, start = with_model(tokenizer), tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert not said(dp, lambda dp: dp.attribute([start, 5, 6], Tokens()))
    assert not said(dp, lambda dp: dp.attribute([5, start], Tokens(), "b", allocation="shapley"))
    assert len(said(dp, lambda dp: dp.attribute([[5, 6], [6, 5], [start, 5]], Tokens()))) == 1
    end, word = (tokenizer.convert_tokens_to_ids(text) for text in ("[END", "word"))
    assert not said(dp, lambda dp: dp.attribute([5, end], Tokens(), "b", allocation="shapley"))
    assert len(said(dp, lambda dp: dp.attribute([5, word], Tokens(), "b", allocation="shapley"))) == 1
    assert len(said(dp, lambda dp: dp.attribute([word, 5], Tokens()))) == 1


class OfAnotherLibrary:
    """A tokenizer as mistral-common's behind transformers: what it has no answer to is a method that raises."""

    all_special_ids = (1,)

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def added_tokens_decoder(self):
        raise NotImplementedError


class ThatRaises(OfAnotherLibrary):
    @property
    def added_tokens_decoder(self):
        raise NotImplementedError


@pytest.mark.parametrize("kind", [OfAnotherLibrary, ThatRaises])
def test_a_tokenizer_that_does_not_tell_its_added_tokens(kind):
    dp = with_model(byte_level(" a", " b", bos_token="<s>"))
    dp = DePass(dp.model, kind(dp.tokenizer))
    (first,) = said(dp, lambda dp: dp.attribute([5, 6], Tokens()))
    assert "begins with no start token" in first
    (space,) = said(dp, lambda dp: dp.attribute("a", Tokens(), " a", contrast="b", allocation="shapley"))
    assert space.startswith("contrast: 'b' has no space in front of it, and continues the word before it, 'a'.")
    (space,) = said(dp, lambda dp: dp.attribute(["a"], Tokens(), targets=["b"], allocation="shapley"))
    assert space.startswith("targets: 'b' has no space")
