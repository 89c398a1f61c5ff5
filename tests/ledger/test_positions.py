"""Heads and neurons at some positions: they sum to those of all, and what is written elsewhere is in `rest`."""

import time
from dataclasses import replace

import pytest
import torch

import depass_fast.ledger.positions as positions_of_a_ledger
from depass_fast import Attribution, DePass, LayeredAttribution
from depass_fast.ledger.places import _Way
from tests.support.family_models import build_model
from tests.support.models import random_ids
from tests.support.trained import smollm2

IDS = random_ids(6, seed=4)


def model_of(model_type):
    shape = {} if model_type in ("gpt2", "gpt_neox", "olmo2") else {"num_key_value_heads": 2}
    return DePass(build_model(model_type, **shape).double())


@pytest.mark.parametrize("rule", ["shapley", "half", "taylor"])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma2", "mixtral", "gpt2", "olmo2"])
def test_positions_sum_to_the_whole(model_type, rule):
    book = model_of(model_type).ledger(IDS, [3, (4, 5)], rule=rule)
    for ask in (book.heads, book.neurons):
        whole, each = ask(), [ask(positions=n) for n in range(len(IDS))]
        for index, layer in enumerate(whole):
            parts = torch.stack([one.by_layer[index].scores[:, : len(layer.labels) - layer.n_extras] for one in each])
            expected = layer.scores[:, : len(layer.labels) - layer.n_extras]
            assert torch.allclose(parts.sum(0), expected, rtol=0, atol=1e-12 * expected.abs().max())
        for one in each:
            assert one.completeness_error < 1e-12
            for result in one:  # what is written elsewhere is not lost
                assert torch.allclose(result.scores.sum(1), result.target_logits.to(result.scores))


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_several_positions_are_added_up(kind):
    ask = getattr(model_of("mixtral").ledger(IDS, 3), kind)
    for index, both in enumerate(ask(positions=[1, 4])):
        named = slice(0, len(both.labels) - both.n_extras)
        one, other = (ask(positions=n).by_layer[index].scores[named] for n in (1, 4))
        assert torch.allclose(both.scores[named], one + other, rtol=0, atol=1e-12 * both.scores.abs().max())


@pytest.mark.parametrize("read", [-1, 3, [1, -1]])
def test_several_positions_and_what_a_result_says(read, tmp_path):
    book = model_of("llama").ledger(IDS, 3, position=read)
    several = isinstance(read, list)
    whole, answer = book.heads(1, positions=[0, 2]), book.heads(1, positions=[2, -6])
    for one, other in zip(*([both] if not several else both for both in (whole, answer)), strict=True):
        assert one.written_at == other.written_at == [0, 2] and torch.equal(one.scores, other.scores)
        assert "heads at layer 1, written at [0, 2] | exact" in str(one)
        assert one.how()["written_at"] == one.to_dict()["written_at"] == [0, 2]
        one.save(tmp_path / "one.safetensors")
        assert Attribution.load(tmp_path / "one.safetensors").written_at == [0, 2]
    layered = book.neurons(positions=5)
    layered = layered[0] if several else layered
    assert isinstance(layered, LayeredAttribution) and layered.written_at == [5]
    assert "written_at" in layered.how() and book.heads(1) is not None
    untold = book.heads(1)[0] if several else book.heads(1)
    assert untold.written_at is None and "written" not in str(untold)


def test_behind_what_is_read_nothing_is_written():
    book = model_of("llama").ledger(IDS, 3, position=2)
    found = book.neurons(positions=[4, 5])
    assert not found.scores.any() and found.completeness_error < 1e-12


def test_a_ledger_from_a_file_has_them_too(tmp_path):
    dp = model_of("llama")
    book = dp.ledger(IDS, 3)
    book.save(tmp_path / "book.safetensors")
    found = dp.load_ledger(tmp_path / "book.safetensors").neurons(positions=[1, 3])
    assert torch.allclose(found.scores, book.neurons(positions=[1, 3]).scores)


def test_what_cannot_be_asked():
    dp = model_of("llama")
    with pytest.raises(ValueError, match=r"positions: they are of one prompt, and this ledger is of 2\."):
        dp.ledger([IDS, IDS], 3).heads(positions=0)
    book = dp.ledger(IDS, 3, attention=True)
    with pytest.raises(ValueError, match="positions: the second book is of all positions together"):
        book.steered.neurons(positions=0)
    assert book.neurons(positions=0).written_at == [0]
    for wrong in (6, -7, [0, 9]):
        with pytest.raises(ValueError, match=r"positions: -?\d is out of range"):
            book.heads(positions=wrong)
    with pytest.raises(TypeError, match="positions: "):
        book.heads(positions="last")


def test_what_is_wrong_is_said_before_the_forward_pass(monkeypatch):
    dp = model_of("llama")
    book = dp.ledger(IDS, 3)
    monkeypatch.setattr("depass_fast.ledger.positions.with_trace", None)
    with pytest.raises(ValueError, match="layer: 99 is out of range"):
        book.heads(99, positions=0)
    with torch.no_grad():
        dp.model.lm_head.weight.add_(1)
    with pytest.raises(ValueError, match="the model's weights have changed"):
        book.neurons(positions=0)


def test_only_what_is_asked_is_worked_out(monkeypatch):
    book, asked = model_of("llama").ledger(IDS, 3), []
    found = _Way.shares

    def counted(way, layer, of_heads):
        asked.append((layer, of_heads))
        return found(way, layer, of_heads)

    monkeypatch.setattr(_Way, "shares", counted)
    traced = positions_of_a_ledger.with_trace
    monkeypatch.setattr(positions_of_a_ledger, "with_trace", lambda request: (time.sleep(0.3), traced(request))[1])
    assert book.heads(1, positions=0).seconds >= 0.3
    book.neurons(layers=[0, 2], positions=0)
    assert asked == [(1, True), (0, False), (2, False)]


def in_another_order(mlps):
    return mlps[::-1]


def from_other_positions(mlps):
    at = mlps[0].positions
    return (replace(mlps[0], positions=(at + 1) % len(IDS)), *mlps[1:])


@pytest.mark.parametrize("change", [in_another_order, from_other_positions])
def test_experts_that_are_others_this_time_are_seen(change, monkeypatch):
    book = model_of("mixtral").ledger(IDS, 3)
    again = positions_of_a_ledger.with_trace

    def otherwise(request):
        request = again(request)
        layer = request.trace.layers[1]
        request.trace.layers[1] = replace(layer, mlps=change(layer.mlps))
        return request

    monkeypatch.setattr(positions_of_a_ledger, "with_trace", otherwise)
    with pytest.raises(RuntimeError, match="positions: .* other experts of layer 1 than"):
        book.neurons(positions=0)


def test_a_model_whose_single_positions_are_not_known(monkeypatch):
    dp = model_of("llama")
    book = dp.ledger(IDS, 3)
    monkeypatch.setattr(type(dp.adapter), "beyond_one_norm", ["several residual streams"])
    with pytest.raises(ValueError, match=r"positions: .* not known of what this model has: several residual streams\."):
        book.heads(positions=0)


def test_on_a_trained_model_the_sinks_neurons_are_those_of_the_first_position():
    dp = DePass(*smollm2(), progress=False)
    book = dp.ledger("The capital of France is", " Paris")
    (everywhere, _), *_ = book.neurons().top(1)
    (first, share), *_ = book.neurons(positions=0).top(1)
    later = book.neurons(positions=[1, 2, 3, 4])
    assert everywhere == first == "L0N585" and share == pytest.approx(book.neurons().score("L0N585"), rel=0.01)
    assert abs(later.score("L0N585")) < 0.01 * abs(share) and later.top(1)[0][0] != "L0N585"
