"""Hidden states of last tokens, classifiers on them, and components as logits of the whole vocabulary."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from depass_fast import DePass, Modules, Subspaces, Tokens
from depass_fast.demo import load_demo
from depass_fast.evaluate import decoding
from depass_fast.evaluate.decoding import part_logits, rank
from depass_fast.evaluate.interventions import batches
from depass_fast.evaluate.probes import fit_classifier, last_hidden_states
from tests.support.family_models import VARIANTS, build_model
from tests.support.models import random_ids


@pytest.fixture(scope="module")
def demo() -> DePass:
    return DePass(*load_demo(), progress=False)


# -- hidden states --------------------------------------------------------------------------------------------------


def test_states_are_those_of_a_trace(demo):
    texts = ["The capital of", "When Mary went to the store", "The capital of", "The"]
    found = last_hidden_states(demo, texts, [4, 0, 2])
    assert found.shape == (4, 3, 128) and found.dtype == torch.float32
    for text, states in zip(texts, found, strict=True):
        trace = demo.trace(text)
        expected = torch.stack([trace.resid(layer)[-1] for layer in (4, 0, 2)])
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


def test_a_pass_ends_at_the_last_layer_asked_for_and_leaves_no_hooks(demo):
    seen = []
    hook = demo.adapter.block(3).register_forward_hook(lambda *_: seen.append(3))
    try:
        last_hidden_states(demo, ["The capital of"], [2])
        assert not seen
        last_hidden_states(demo, ["The capital of"], [4])
        assert seen
    finally:
        hook.remove()
    assert not any(module._forward_pre_hooks for module in demo.model.modules())


def test_states_are_refused_that_there_are_not(demo):
    with pytest.raises(ValueError, match="layers: 6 is no layer; the model has layers 0 to 5"):
        last_hidden_states(demo, ["The"], [2, 6])
    with pytest.raises(ValueError, match="layers: there is none"):
        last_hidden_states(demo, ["The"], [])
    engine = DePass(demo.model)
    with pytest.raises(ValueError, match="this engine has none"):
        last_hidden_states(engine, ["The"], [1])
    engine.tokenizer = SimpleNamespace(encode=lambda text: [])
    with pytest.raises(ValueError, match="'The' has no tokens"):
        last_hidden_states(engine, ["The"], [1])


def test_batches_are_of_one_length_and_hold_every_row_once():
    rows = [(1, 2), (3,), (1, 2), (4, 5), *((n,) * 400 for n in range(5))]
    found = list(batches(rows))
    assert [[len(row) for row in batch] for batch in found] == [[2, 2], [1], [400] * 2, [400] * 2, [400]]
    assert sorted(row for batch in found for row in batch) == sorted(set(rows))


# -- classifiers ----------------------------------------------------------------------------------------------------


def clusters(classes: int, count: int, size: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(classes, size, generator=generator)
    y = torch.arange(classes).repeat_interleave(count)
    return centres[y] + torch.randn(len(y), size, generator=generator), y


def test_a_separable_set_is_learnt_and_spans_one_dimension_less_than_classes():
    x, y = clusters(4, 30, 12)
    found = fit_classifier(x[::2], y[::2], 4)
    assert (found.predict(x[1::2]) == y[1::2]).all()
    torch.testing.assert_close(found.weight.sum(0), torch.zeros(12, dtype=torch.float64))
    basis = found.basis()
    assert basis.shape == (12, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(basis @ (basis.T @ found.weight.T), found.weight.T)


def test_the_fit_is_the_optimum():
    x, y = clusters(3, 40, 5)
    x = x * torch.tensor([1.0, 100.0, 0.01, 1.0, 1.0]) + 7  # it is scaled before it is fitted
    penalty, found = 1e-2, fit_classifier(x, y, 3, penalty=1e-2)
    scale = x.double().std(0) + 1e-6
    probabilities = (x.double() @ found.weight.T + found.bias).softmax(-1)
    error = probabilities - torch.nn.functional.one_hot(y, 3)
    z = (x.double() - x.double().mean(0)) / scale
    gradient = error.T @ z / len(y) + 2 * penalty * found.weight * scale
    assert gradient.abs().max() < 1e-5 and error.mean(0).abs().max() < 1e-5


def test_shuffled_labels_are_not_learnt():
    x, y = clusters(4, 100, 8)
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    accuracy = (fit_classifier(x[::2], y[::2], 4).predict(x[1::2]) == y[1::2]).double().mean()
    assert abs(accuracy - 0.25) < 0.12


def test_a_class_without_examples_is_refused():
    x, y = clusters(3, 5, 4)
    with pytest.raises(ValueError, match="none is of class 3"):
        fit_classifier(x, y, 4)


# -- components as logits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2: tight caps", "phi", "opt: stream norms, projected embedding"])
def test_the_logits_of_all_parts_sum_to_the_models(name, monkeypatch):
    monkeypatch.setattr(decoding, "TOKENS_AT_ONCE", 24)  # of 64
    model_type, changes = VARIANTS[name]
    engine = DePass(build_model(model_type, **changes), progress=False)
    trace = engine.trace(random_ids(7))
    basis = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(0))).Q
    hidden = trace.normed_final[-1]
    for components in (Tokens(), Subspaces(1, [basis]), Modules(1)):
        parts = engine.decompose(trace, components).dense()[-1]
        found = part_logits(engine, parts, hidden)
        assert found.shape == (len(parts), 64)
        constants = engine.adapter.unembedding_bias
        whole = found.sum(0) + (0 if constants is None else constants)
        torch.testing.assert_close(whole, engine.adapter.logits(hidden), atol=1e-5, rtol=1e-4)


def test_a_rank_counts_from_one_among_all_or_some():
    logits = torch.tensor([0.5, 3.0, -1.0, 2.0])
    assert [rank(logits, token) for token in range(4)] == [3, 1, 4, 2]
    assert rank(logits, 0, torch.tensor([0, 2])) == 1 and rank(logits, 2, torch.tensor([0, 2])) == 2
