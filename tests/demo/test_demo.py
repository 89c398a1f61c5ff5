"""The shipped model knows what it is said to know, and everything works on it as on a real one."""

import json

import pytest
import torch

from depass_fast import DePass, Heads, Neurons, Subspaces, Tokens
from depass_fast.demo import demo_path, demo_prompts
from depass_fast.demo.evaluate import accuracy, fit_probe, hidden_states, with_recall


def test_size_and_figures():
    assert sum(f.stat().st_size for f in demo_path().iterdir()) <= 10_000_000
    figures = json.loads((demo_path() / "figures.json").read_text())
    assert figures["targets_met"]


@pytest.mark.parametrize("split", ["heldout_pairs", "heldout_templates", "heldout"])
def test_indirect_objects(demo, split):
    prompts = demo_prompts("ioi", split, count=300)
    answers = [p.answer for p in prompts]
    assert accuracy(demo.model, demo.tokenizer, [p.text for p in prompts], answers) >= 0.97


@pytest.mark.parametrize("language", ["en", "fr", "de"])
def test_facts(demo, language):
    prompts = demo_prompts("facts", "all", language=language)
    assert len({p.entity for p in prompts}) >= 400 and len({p.relation for p in prompts}) >= 4
    prompts = prompts[::17]
    assert accuracy(demo.model, demo.tokenizer, [p.text for p in prompts], [p.answer for p in prompts]) >= 0.97


def statements(dp, split, count):
    items = demo_prompts("statements", split)
    items = items[:: len(items) // count]
    return with_recall(dp.model, dp.tokenizer, items), torch.tensor([s.label for s in items])


def test_a_probe_tells_true_from_false_and_its_share_is_attributed(demo):
    layer = 5
    states = {}
    for split in ("train", "heldout"):
        texts, labels = statements(demo, split, 400)
        states[split] = hidden_states(demo.model, demo.tokenizer, texts)[:, layer], labels
    weight, bias = fit_probe(*states["train"])
    x, labels = states["heldout"]
    assert ((x @ weight + bias > 0) == labels).float().mean() >= 0.9
    # where the probe's reading comes from: its direction as the target at the input of that layer
    result = demo.attribute(texts[0], Tokens(), weight, end=layer)
    assert result.completeness_error < 1e-5
    assert float(result.scores.sum()) == pytest.approx(float(x[0] @ weight), rel=1e-3, abs=1e-3)
    # and the subspace that it spans carries its reading alone
    subspace = demo.decompose(texts[0], Subspaces(layer, [weight[:, None]]), end=layer).dense()[-1]
    assert float(subspace[0] @ weight) == pytest.approx(float(x[0] @ weight), rel=1e-3, abs=1e-3)
    assert abs(float(subspace[1] @ weight)) < 1e-3 * float(weight.norm() * x[0].norm())


def test_the_tokens_that_matter_for_an_indirect_object(demo):
    """The name that is given to speaks for the answer, and the names carry most of the difference."""
    carried = 0
    for prompt in demo_prompts("ioi", "heldout", count=20):
        result = demo.attribute(prompt.text, Tokens(), (prompt.answer, prompt.distractor))
        assert result.completeness_error < 1e-5
        assert result.scores[result.tokens.index(prompt.answer)] > 0
        names = [n for n, token in enumerate(result.tokens) if token in (prompt.answer, prompt.distractor)]
        carried += bool(result.scores[names].abs().sum() > 0.5 * result.scores.abs().sum())
    assert carried >= 18


def test_text_ids_and_chat_are_one(demo):
    text = demo_prompts("facts", "all", language="en")[0].text
    ids = demo.tokenizer(text)["input_ids"]
    assert ids[0] == demo.tokenizer.bos_token_id
    assert torch.equal(demo.attribute(text, Tokens()).scores, demo.attribute(ids, Tokens()).scores)
    chat = demo.attribute([{"role": "user", "content": "Who is it?"}], Tokens())
    assert chat.input_ids.count(demo.tokenizer.bos_token_id) == 1
    assert len(demo.attribute([text, text + " x"], Tokens())) == 2


def test_strings_as_targets(demo):
    prompt = demo_prompts("facts", "all", language="en")[0]
    result = demo.attribute(prompt.text, Heads(2), (prompt.answer, prompt.distractor))
    assert result.target_names == [f"{prompt.answer!r} - {prompt.distractor!r}"]
    with pytest.raises(ValueError, match=r"target: ' Montevideo Quux' is \d+ tokens: \[.*\]; one is needed"):
        demo.attribute(prompt.text, Tokens(), " Montevideo Quux")
    with pytest.raises(ValueError, match="prompt: empty"):
        demo.attribute("", Tokens())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_from_pretrained(dtype):
    dp = DePass.from_pretrained(str(demo_path()), dtype=dtype, device_map="auto", temperature=0.2)
    assert dp.adapter.dtype == getattr(torch, dtype) and not dp.model.training
    result = dp.attribute(demo_prompts("ioi", count=1)[0].text, Neurons(1))
    assert result.temperature == 0.2 and result.dtype == dtype
    assert result.completeness_error <= (1e-5 if dtype == "float32" else 1e-2)


def test_several_devices_need_accelerate(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(
        ImportError, match=r"over several devices needs accelerate: pip install 'depass-fast\[device-map"
    ):
        DePass.from_pretrained(str(demo_path()), device_map="balanced")
