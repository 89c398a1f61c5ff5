"""Chat and labels of a trained model, SmolLM2-135M."""

import pytest

from depass_fast import DePass, Tokens
from depass_fast.inputs.token_texts import token_texts
from depass_fast.labels import shown_tokens, text_of_tokens

trained = pytest.importorskip("tests.support.trained")

CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is"},
]


@pytest.fixture(scope="module")
def dp():
    return DePass(*trained.smollm2())


def test_it_ends_its_own_sentence(dp):
    continued = dp.attribute(CHAT, Tokens())
    assert continued.target_names == ["' Paris'"] and continued.tokens[-1] == " is"
    anew = dp.attribute(CHAT, Tokens(), chat_template_kwargs={"add_generation_prompt": True})
    assert anew.target_names == ["'The'"]


def test_japanese(dp):
    result = dp.attribute("日本の首都は", Tokens(), ["<0xE7>", "<0xE8>", "<0xE9>"])
    bytes_of_it = ["<0xE6><0x97>", "<0xA5>", "本", "の", "<0xE9>", "<0xA6>", "<0x96>", "<0xE9>", "<0x83><0xBD>"]
    assert result.tokens == [*bytes_of_it, "<0xE3><0x81>", "<0xAF>"]
    assert result.target_names == ["'<0xE7>'", "'<0xE8>'", "'<0xE9>'"]
    shown = ["日¹⁄₂", "日²⁄₂", "本", "の", "首¹⁄₃", "首²⁄₃", "首³⁄₃", "都¹⁄₂", "都²⁄₂", "は¹⁄₂", "は²⁄₂"]
    assert shown_tokens(result.tokens) == shown


@pytest.mark.parametrize(
    "text", ["玛丽和约翰去商店", "ذهبت مريم إلى المتجر", "मैरी और जॉन दुकान गए", "👩‍🚀 🏳️‍🌈 ok", "สวัสดีครับ ผมชื่อ", "a\n\tb"]
)
def test_any_script_is_shown_as_itself(dp, text):
    tokens = token_texts(dp.tokenizer.encode(text), dp.tokenizer)
    shown = shown_tokens(tokens)
    assert text_of_tokens(tokens) == text and not any("<0x" in one for one in shown)
    assert set(text) <= set("".join(shown)) | {"\u200d"}  # the joiner is written as an escape
