"""Sparse attention: the keys that an indexer selects are recorded as the model used them, and the mask is frozen."""

import pytest
import torch

from depass_fast import DePass, Neurons, Tokens
from depass_fast.compat import decomposed_state_manager
from depass_fast.evaluate.frozen import frozen_attention
from depass_fast.trace.attention import attention_probabilities
from depass_fast.trace.selection import seen_by_heads, seen_in, selected
from tests.support.family_models import available, build_variant
from tests.support.models import random_ids

PROMPT = torch.tensor(random_ids(9))
SHARED = "glm_moe_dsa: shared selection"

pytestmark = pytest.mark.skipif(not available(SHARED), reason="transformers without sparse attention")


@pytest.fixture(scope="module")
def engine() -> DePass:
    return DePass(build_variant(SHARED, implementation="eager"))


@torch.no_grad()
def test_probabilities_are_the_models_own(engine):
    """In each layer, one of which takes the selection of another."""
    trace = engine.trace(PROMPT)
    theirs = engine.model(PROMPT[None], output_attentions=True).attentions
    every = torch.arange(len(PROMPT))
    for layer, own in zip(trace.layers, theirs, strict=True):
        p = attention_probabilities(layer.attention, every, every, torch.float32)
        assert torch.allclose(p, own[0], atol=1e-6)
        assert ((p > 0).sum(-1) == (every + 1).clamp_max(3)).all()
    first, second, third = (layer.attention.chosen_keys for layer in trace.layers)
    assert second is first and not torch.equal(first, third)


def test_a_prompt_without_a_hidden_key_records_no_selection(engine):
    trace = engine.trace(PROMPT[:3])
    assert all(layer.attention.chosen_keys is None for layer in trace.layers)


def test_positions_become_a_mask():
    chosen = torch.tensor([[0, -1, 3], [2, 1, 9]])
    assert selected(chosen, 4).tolist() == [[True, False, False, True], [False, True, True, False]]
    assert selected(chosen, 2).tolist() == [[True, False], [False, True]]


def test_a_mask_becomes_positions():
    """Masks are of bool, or added to the logits, as Qwen 4's in eager attention before transformers 5.23."""
    mask = torch.tensor([[True, False, False], [True, True, False], [False, True, True]])[None, None]
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert seen_in(mask, 2).tolist() == seen_in(added, 2).tolist() == [[[0, -1], [1, 0], [2, 1]]]


@pytest.mark.parametrize("rule", ["taylor", "softmax"])
def test_the_adjoint_sweep_goes_through_the_selection(engine, rule):
    exact = engine.attribute(PROMPT, Neurons(0), 5, method="exact", allocation=rule)
    adjoint = engine.attribute(PROMPT, Neurons(0), 5, method="adjoint", allocation=rule)
    allowed = 1e-5 if rule == "taylor" else 0.2
    assert (exact.scores - adjoint.scores).norm() <= allowed * exact.scores.norm()


def test_a_key_that_was_not_selected_has_no_explanation(engine):
    record = engine.trace(PROMPT).layers[2].attention
    hidden = next(key for key in range(8) if key not in record.chosen_keys[8].tolist())
    with pytest.raises(ValueError, match=f"key: {hidden} is not selected by the indexer of layer 2"):
        engine.explain_attention(PROMPT, Tokens(), 2, key=hidden)


def test_what_does_not_know_sparse_attention_refuses_it(engine):
    with pytest.raises(ValueError, match="the published interface does not know sparse attention"):
        decomposed_state_manager(engine.model, None)
    held = pytest.raises(ValueError, match="held attention does not know sparse attention")
    with held, frozen_attention(engine, engine.trace(PROMPT)):
        pass


@torch.no_grad()
def test_blocks_of_keys_are_selected_for_every_group_of_heads():
    """MiniMax M3: blocks of two positions, two of them for each of two KV heads; one layer sees every key."""
    if not available("minimax_m3_vl_text"):
        pytest.skip("transformers without MiniMax M3")
    blocks = DePass(build_variant("minimax_m3_vl_text", implementation="eager"))
    trace, every = blocks.trace(PROMPT), torch.arange(len(PROMPT))
    theirs = blocks.model(PROMPT[None], output_attentions=True).attentions
    for layer, own in zip(trace.layers, theirs, strict=True):
        assert torch.allclose(attention_probabilities(layer.attention, every, every, torch.float32), own[0], atol=1e-6)
    first, second, third = (layer.attention for layer in trace.layers)
    assert second.chosen_keys is None and first.chosen_keys.shape == third.chosen_keys.shape == (9, 2, 2)
    assert not torch.equal(third.chosen_keys[:, 0], third.chosen_keys[:, 1])
    assert all(layer.attention.chosen_keys is None for layer in blocks.trace(PROMPT[:4]).layers)


def test_blocks_become_a_mask_by_head():
    chosen = torch.tensor([[[0, -1], [1, 0]], [[1, -1], [0, -1]]])  # of two queries, for two groups
    seen = seen_by_heads(chosen, 3, 2, 4)
    assert seen.shape == (4, 2, 3) and torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert seen[0].tolist() == [[True, True, False], [False, False, True]]
    assert seen[2].tolist() == [[True, True, True], [True, True, False]]
