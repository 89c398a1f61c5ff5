"""Chat messages: a last one of the assistant's is continued, and the template gets its arguments."""

import warnings

import pytest

from depass_fast import DePass, InputWarning, Tokens
from tests.support.family_models import build_model
from tests.support.plans import assert_same
from tests.support.tokenizers import byte_level

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if tools %}[{{ tools | length }}]{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% if thinks %}(hm){% endif %}{% endif %}"
)
USER = {"role": "user", "content": "Hi?"}
REPLY = {"role": "assistant", "content": "It is"}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}


@pytest.fixture(scope="module")
def dp():
    tokenizer = byte_level(eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    model = build_model("llama", num_key_value_heads=2, vocab_size=len(tokenizer))
    return DePass(model, tokenizer, exclude_special=False)


def text_of(dp, prompt, **options):
    return "".join(dp.attribute(prompt, Tokens(), **options).tokens)


def test_an_answer_that_has_begun_is_continued(dp):
    assert text_of(dp, [USER]) == "<user>Hi?</s><assistant>"
    assert text_of(dp, [USER, REPLY]) == "<user>Hi?</s><assistant>It is"
    assert text_of(dp, [USER, REPLY, USER]).endswith("<assistant>It is</s><user>Hi?</s><assistant>")
    both = dp.attribute([[USER], [USER, REPLY]], Tokens())
    assert ["".join(result.tokens)[-3:] for result in both] == ["nt>", " is"]
    generated = dp.attribute_generation([USER, REPLY], max_new_tokens=2)
    assert "".join(generated.tokens[: generated.prompt_length]).endswith("<assistant>It is")


def test_the_demo_model_ends_its_own_sentence(demo):
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nyria Morstam speaks"}]
    result = demo.attribute(chat, Tokens())
    assert result.tokens[-1] == " speaks" and result.completeness_error < 1e-5


def test_arguments_of_the_template(dp):
    assert text_of(dp, [USER], chat_template_kwargs={"thinks": True}).endswith("<assistant>(hm)")
    assert text_of(dp, [USER], chat_template_kwargs={"tools": [TOOL]}).endswith("</s>[1]<assistant>")
    assert text_of(dp, [USER, REPLY], chat_template_kwargs={"add_generation_prompt": True}).endswith("</s><assistant>")
    assert text_of(dp, [USER], chat_template_kwargs={"add_generation_prompt": False}).endswith("Hi?</s>")
    assert text_of(dp, [USER], chat_template_kwargs={"continue_final_message": True}).endswith("Hi?")
    thinking = {"thinks": True}
    count = len(text_of(dp, [USER], chat_template_kwargs=thinking)) - 3  # `</s>` is one token
    assert dp.trace([USER], chat_template_kwargs=thinking).length(0) == count
    planned = dp.plan([USER], Tokens(), measure=False, chat_template_kwargs=thinking)
    assert_same(planned, dp.plan(count, Tokens(), measure=False))
    generated = dp.attribute_generation([USER], max_new_tokens=1, chat_template_kwargs=thinking)
    assert generated.prompt_length == count
    always = DePass(dp.model, dp.tokenizer, chat_template_kwargs=thinking)
    assert text_of(always, [USER]).endswith("(hm)")


def test_an_argument_that_the_template_does_not_read(dp):
    with pytest.warns(InputWarning, match="the tokenizer's chat template reads no 'thinking'"):
        dp.attribute([USER], Tokens(), chat_template_kwargs={"thinking": False, "thinks": False})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dp.attribute([USER, REPLY], Tokens(), chat_template_kwargs={"tools": None, "thinks": True})


@pytest.mark.parametrize(
    ("messages", "options", "error", "message"),
    [
        ([{"role": "system", "content": "x"}], {}, ValueError, "chat template refuses these messages: no system role"),
        ([USER, {"role": "assistant", "content": " "}], {}, ValueError, "the last message is .* and holds no text"),
        ([USER, {"role": "assistant", "tool_calls": []}], {}, ValueError, "the last message is .* and holds no text"),
        ([USER], {"tokenize": False}, ValueError, "chat_template_kwargs: 'tokenize' says how ids are returned"),
        ([USER], ["thinks"], TypeError, "chat_template_kwargs: expected a dict such as"),
    ],
)
def test_what_is_refused(dp, monkeypatch, messages, options, error, message):
    monkeypatch.setattr("depass_fast.request.capture", None)  # before any work
    with pytest.raises(error, match=message):
        dp.attribute(messages, Tokens(), chat_template_kwargs=options)


def test_without_a_template(dp):
    bare = DePass(dp.model, byte_level())
    with pytest.raises(ValueError, match="the tokenizer has no chat template; give text or ids"):
        bare.attribute([USER], Tokens())
    assert text_of(bare, [USER], chat_template_kwargs={"chat_template": "{{ messages[0]['content'] }}"}) == "Hi?"

    class Common:  # mistral-common's knows how to write a chat, and has no template
        chat_template = None

        def apply_chat_template(self, conversation, **arguments):
            self.seen = arguments
            return [1, 2]

        def encode(self, text, **_):
            return [1]

        def decode(self, ids, **_):
            return "x"

    common = Common()
    assert DePass(dp.model, common).attribute([USER, REPLY], Tokens()).input_ids == [1, 2]
    assert common.seen == {"tokenize": True, "return_dict": False, "continue_final_message": True}
    DePass(dp.model, common).attribute([USER], Tokens())
    assert common.seen == {"tokenize": True, "return_dict": False}  # in transformers 4 it refuses any more


def test_templates_by_their_names(dp, monkeypatch):
    read = "{{ messages[0]['content'] }}{% if tools %}[{{ tools | length }}]{% endif %}"
    monkeypatch.setattr(dp.tokenizer, "chat_template", {"default": TEMPLATE, "tool_use": read, "bare": "Hi"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text_of(dp, [USER], chat_template_kwargs={"thinks": True}).endswith("(hm)")
        assert text_of(dp, [USER], chat_template_kwargs={"tools": [TOOL]}) == "Hi?[1]"
    with pytest.warns(InputWarning, match="reads no 'tools'"):
        dp.attribute([USER], Tokens(), chat_template_kwargs={"tools": [TOOL], "chat_template": "bare"})


def test_a_lone_surrogate_and_a_lone_message(dp):
    half = "Hi\ud800"
    for prompt, options, argument in (
        (half, {}, "prompt"),
        ([{"role": "user", "content": half}], {}, "prompt"),
        ("Hi", {"target": half}, "target"),
        ("Hi", {"target": 3, "contrast": half}, "contrast"),
        ("Hi", {"continuation": half}, "continuation"),
    ):
        with pytest.raises(ValueError, match=rf"{argument}: character 2 is '\\ud800', a lone surrogate"):
            dp.attribute(prompt, Tokens(), **options)
    with pytest.raises(TypeError, match=r"got dict; give one message in a list, \[message\]"):
        dp.attribute(USER, Tokens())
