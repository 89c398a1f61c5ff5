"""A tokenizer may be given as a processor or a path; a GGUF file has its own; a generation is as long as asked for."""

import contextlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from depass_fast import DePass, InputWarning, Tokens
from depass_fast.demo import demo_path, load_demo
from depass_fast.inputs import gguf_files, loading
from tests.support.models import build, random_ids

PROMPT = "Nyria Morstam speaks"
# before transformers 5, 20 is what a GenerationConfig says that nobody chose
CHOSEN_20 = 20 if GenerationConfig().max_length is None else 25
COMPLETE = {"missing_keys": set(), "mismatched_keys": set()}  # of a checkpoint with all weights


class Processor:
    """A processor of text and images holds the tokenizer."""

    def __init__(self, tokenizer, chat_template=None):
        self.tokenizer, self.chat_template = tokenizer, chat_template

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)

    def __call__(self, text, images=None):
        return self.tokenizer(text)


def test_a_processor_a_path_and_a_bare_tokenizer(demo):
    expected = demo.attribute(PROMPT, Tokens())
    for given in (Processor(demo.tokenizer), str(demo_path()), Path(demo_path()), demo.tokenizer.backend_tokenizer):
        result = DePass(demo.model, given).attribute(PROMPT, Tokens())
        assert result.labels == expected.labels and torch.equal(result.scores, expected.scores)
    assert DePass(demo.model, Processor(demo.tokenizer)).tokenizer is demo.tokenizer


def test_a_processor_may_keep_the_chat_template(demo):
    tokenizer = load_demo()[1]
    template, tokenizer.chat_template = tokenizer.chat_template, None
    chat = [{"role": "user", "content": "Who is it?"}]
    result = DePass(demo.model, Processor(tokenizer, template)).attribute(chat, Tokens())
    assert result.input_ids == demo.attribute(chat, Tokens()).input_ids
    assert tokenizer.chat_template is None  # the user's own is as before


def test_what_is_no_tokenizer(demo, tmp_path):
    for given, name in ((AutoTokenizer, "the class AutoTokenizer"), (5, "int"), (Processor(None), "Processor")):
        with pytest.raises(TypeError, match=f"tokenizer: expected a tokenizer, .* or a path, got {name}"):
            DePass(demo.model, given)
    with pytest.raises(ValueError, match="tokenizer: none could be loaded from"):
        DePass(demo.model, tmp_path)


def test_the_tokenizer_of_a_gguf_file(monkeypatch):
    model, tokenizer = load_demo()
    asked = {}

    def loaded(kind, value):
        def from_pretrained(path, **arguments):
            asked[kind] = arguments
            return value

        return from_pretrained

    monkeypatch.setattr(gguf_files, "find_spec", lambda name: name)  # have the packages
    monkeypatch.setattr(loading, "read_once", contextlib.nullcontext)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded("model", (model, COMPLETE)))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", loaded("tokenizer", tokenizer))
    dp = DePass.from_pretrained("a/hub-name", model_kwargs={"gguf_file": "m.gguf", "revision": "x"})
    assert asked["tokenizer"] == {"gguf_file": "m.gguf", "revision": "x"} and dp.tokenizer is tokenizer
    assert asked["model"]["gguf_file"] == "m.gguf"

    def broken(path, **arguments):
        raise NotImplementedError("no converter\nfor this architecture")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", broken)
    with pytest.warns(InputWarning, match="none could be read from m.gguf .no converter for this architecture."):
        dp = DePass.from_pretrained("a/hub-name", model_kwargs={"gguf_file": "m.gguf"})
    assert dp.tokenizer is None


def test_a_hub_name_without_a_tokenizer(monkeypatch):
    model, _ = load_demo()

    def missing(path, **arguments):
        raise OSError("offline")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda path, **_: (model, COMPLETE))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", missing)
    with pytest.warns(InputWarning, match=r"tokenizer: none could be read from a/hub-name \(offline\)"):
        DePass.from_pretrained("a/hub-name")


@pytest.mark.parametrize(
    ("new", "generation", "length"),
    [
        (None, {"max_length": 8}, 8),
        (None, {"max_length": 8, "max_new_tokens": 4}, 9),
        (4, {"max_length": 8}, 9),
        (3, None, 8),
        (None, {"generation_config": GenerationConfig(max_length=8)}, 8),
        (None, {"generation_config": GenerationConfig(max_length=20)}, CHOSEN_20),
        (None, {"generation_config": GenerationConfig(max_new_tokens=2)}, 7),
        (None, None, 25),
        (None, {"max_length": None}, 25),
    ],
)
def test_how_long_a_generation_is(new, generation, length):
    dp, ids = build("llama-gqa"), random_ids(5)
    quiet = {"eos_token_id": None} | (generation or {})
    result = dp.attribute_generation(ids, max_new_tokens=new, generation=quiet)
    assert len(result.input_ids) == length


def test_a_length_that_leaves_nothing():
    dp, ids = build("llama-gqa"), random_ids(5)
    with pytest.raises(ValueError, match="max_length: 5 leaves no new token after a prompt of 5; raise it"):
        dp.attribute_generation(ids, generation={"max_length": 5})
    with pytest.raises(ValueError, match="max_length: 65 after a prompt of 5 tokens pass the model's context of 64"):
        dp.attribute_generation(ids, generation={"max_length": 65})
    for wrong in ("3", 2.5, True):
        with pytest.raises(TypeError, match=f"max_new_tokens: expected an integer, got {wrong!r}"):
            dp.attribute_generation(ids, max_new_tokens=wrong)


def test_a_models_own_length_gives_way(monkeypatch):
    dp, ids = build("llama-gqa"), random_ids(5)
    monkeypatch.setattr(dp.model.generation_config, "max_new_tokens", 15)
    result = dp.attribute_generation(ids, generation={"max_length": 8, "eos_token_id": None})
    assert len(result.input_ids) == 8
