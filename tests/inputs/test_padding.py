"""Padded batches give what the unpadded prompts give."""

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from depass_fast import Heads, Tokens
from tests.support.models import build, random_ids

PROMPTS = [random_ids(n, seed=n) for n in (5, 9, 2)]


@pytest.fixture
def dp():
    return build("llama-gqa")


def padded(side: str, kind: str = "torch") -> BatchEncoding:
    """The prompts as a tokenizer pads them; padding is id 0, which is a token as well."""
    longest = max(map(len, PROMPTS))
    ids, masks = [], []
    for prompt in PROMPTS:
        pad, real = [0] * (longest - len(prompt)), [1] * len(prompt)
        ids.append(pad + prompt if side == "left" else prompt + pad)
        masks.append(pad + real if side == "left" else real + pad)
    make = {"torch": torch.tensor, "numpy": np.array, "lists": list}[kind]
    return BatchEncoding({"input_ids": make(ids), "attention_mask": make(masks)})


@pytest.mark.parametrize("kind", ["torch", "numpy", "lists"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(dp, side, kind):
    batch = padded(side, kind)
    for position in (-1, 1):
        expected = dp.attribute(PROMPTS, Tokens(), 5, position=position)
        results = dp.attribute(batch, Tokens(), 5, position=position)
        assert len(results) == 3
        for result, oracle in zip(results, expected, strict=True):
            assert torch.equal(result.scores, oracle.scores)
            assert (result.labels, result.position) == (oracle.labels, oracle.position)
    trace = dp.trace(batch)
    assert trace.batch and trace.n_prompts == 3 and int(trace.offsets[-1]) == 16
    alone = dp.attribute(PROMPTS[0], Heads(1))
    assert torch.allclose(dp.attribute(trace, Heads(1))[0].scores, alone.scores, atol=1e-5)
    state = dp.decompose(batch, Tokens(1), end=2)
    assert torch.equal(state.dense(2), dp.decompose(PROMPTS, Tokens(1), end=2).dense(2))


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-window"])
def test_it_is_what_the_model_makes_of_the_padded_batch(name):
    """With a mask, the model's own logits at the last real token are those of the unpadded prompt."""
    dp, batch = build(name), padded("left")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    own = dp.model(**batch, position_ids=positions).logits[:, -1]
    for result, logits in zip(dp.attribute(batch, Tokens(), [5, 9]), own, strict=True):
        assert torch.allclose(result.target_logits, logits[[5, 9]], atol=1e-4)


def test_one_prompt_is_one_prompt(dp):
    oracle = dp.attribute(PROMPTS[0], Tokens())
    ids = torch.tensor([7, *PROMPTS[0], 7])
    mask = torch.tensor([0, 1, 1, 1, 1, 1, 0])
    row = {"input_ids": ids[None], "attention_mask": mask[None].bool()}
    encodings = [
        {"input_ids": PROMPTS[0]},
        {"input_ids": [PROMPTS[0]], "attention_mask": [[1] * 5], "token_type_ids": [[0] * 5], "pixel_values": None},
        {"input_ids": ids, "attention_mask": mask, "offset_mapping": [(0, 1)] * 7, "assistant_masks": [0] * 7},
        {"input_ids": PROMPTS[0], "mm_token_type_ids": [0] * 5, "text": "a row of a data set", "names": ["a"]},
        row,
    ]
    for encoding in encodings:
        assert torch.equal(dp.attribute(encoding, Tokens()).scores, oracle.scores)
    assert len(dp.attribute([row, encodings[0]], Tokens())) == 2
    assert len(dp.attribute({"input_ids": PROMPTS}, Tokens())) == 3  # lists of different lengths, nothing padded
    assert dp.attribute_generation(row, max_new_tokens=2).scores.shape == (2, 7)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ({"attention_mask": [[1] * 4] * 2}, r"must have the shape of input_ids; their rows are \[4, 4\] and \[5, 5\]"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"attention_mask of shape \(B, N\) or \(N,\), got \(2, 1, 5, 5\)"),
        ({"attention_mask": [[1] * 5, [1, 1, 0, 0, 1]]}, r"of row 1: zeros between ones \(at 2\)"),
        ({"attention_mask": [[0] * 5, [1] * 5]}, "of row 0: all padding"),
        ({"attention_mask": [[1] * 5, [2] * 5]}, "of row 1: expected 0 for padding and 1 for tokens"),
        ({"attention_mask": torch.full((2, 5), -torch.inf)}, "of row 0: expected 0 for padding"),
        ({"pixel_values": torch.zeros(2, 3, 8, 8)}, "pixel_values is an input that a decomposition would leave out"),
        ({"token_type_ids": [[0, 0, 0, 1, 1]] * 2}, "token_type_ids is an input"),
        ({"input_ids": torch.zeros(2, 1, 5, dtype=torch.long)}, r"input_ids of shape \(B, N\) or \(N,\)"),
        ({"input_ids": []}, "input_ids holds no prompts"),
        ({"input_ids": [[], [1]]}, "prompt: empty"),
        ({"input_ids": torch.zeros(0, 5, dtype=torch.long)}, "input_ids holds no prompts"),
        ({"input_ids": [[1, 64]] * 2}, "id 64 is outside the vocabulary"),
    ],
)
def test_what_is_refused(dp, monkeypatch, encoding, message):
    monkeypatch.setattr("depass_fast.request.capture", None)  # before any work
    for call in (lambda prompt: dp.attribute(prompt, Tokens()), dp.trace):
        with pytest.raises(ValueError, match=message):
            call({"input_ids": [[1, 2, 3, 4, 5]] * 2, **encoding})


def test_a_batch_where_one_prompt_is_due(dp):
    with pytest.raises(TypeError, match="prompt: one prompt at a time"):
        dp.attribute_generation(padded("left"))
    with pytest.raises(ValueError, match=r"input_ids of one prompt are expected here"):
        dp.attribute([padded("left")], Tokens())
    with pytest.raises(TypeError, match="expected text, token ids or chat messages, got dict"):
        dp.attribute({"role": "user"}, Tokens())
