"""Chat and labels of a trained model, SmolLM2-135M."""

import pytest

from depass_fast import DePass, Tokens

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
