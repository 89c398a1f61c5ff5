"""`dp.sweep`: the results of `attribute`, in the prompts' order, with failures in their place."""

from __future__ import annotations

import warnings

import pytest
import torch

from depass_fast import (
    Adjoint,
    FailedPrompt,
    Heads,
    InputWarning,
    LayeredAttribution,
    LogProb,
    Modules,
    Neurons,
    Tokens,
)
from depass_fast.demo import demo_prompts
from depass_fast.inputs.prompt_set import Item
from depass_fast.sweep import outcomes as rooms
from depass_fast.sweep.asked import Asked
from tests.support.models import build, random_ids
from tests.support.sweeps import random_prompts


def same(one, other, tolerance=1e-5):
    assert type(one) is type(other) and one.labels == other.labels and one.input_ids == other.input_ids
    assert one.target_names == other.target_names and one.position == other.position
    assert (one.scores - other.scores).abs().max() <= tolerance * other.scores.abs().sum()
    assert one.completeness_error < 1e-5


KINDS = [
    (Tokens(), {}),
    (Heads(layers="all"), {}),
    (Heads(3), {"allocation": "shapley"}),
    (Neurons(4), {}),
    (Neurons(layers="all"), {"method": Adjoint(refine=4, sample=0)}),
    (Modules(layers=[1, 2]), {"allocation": "linear"}),
    (Tokens(), {"backend": "reference"}),
    (Heads(layers="all"), {"allocation": "half", "target_kind": "log-prob"}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_results_are_those_of_a_loop_in_the_same_order(demo, kind, options):
    prompts = random_prompts(14)
    found = list(demo.sweep(iter(prompts), kind, **options))
    log_prob = options.pop("target_kind", None)
    target = LogProb() if log_prob else None
    for prompt, result in zip(prompts, found, strict=True):
        same(result, demo.attribute(prompt, kind, target, **options), 1e-4)


def test_targets_contrasts_and_positions_of_each_prompt(demo):
    prompts, names = [one.text for one in demo_prompts("ioi", count=6)], [" Diane", " Grace"]
    several = [[" a", 7], " the", None, 5, [None], " a"]
    positions = [-1, 2, [0, -1], [-1], 3, -2]
    found = list(demo.sweep(prompts, Tokens(), targets=several, positions=positions))
    for prompt, target, position, results in zip(prompts, several, positions, found, strict=True):
        expected = demo.attribute(prompt, Tokens(), target, position=position)
        assert isinstance(results, list) == isinstance(position, list)
        for one, other in zip(*([x] if not isinstance(x, list) else x for x in (results, expected)), strict=True):
            same(one, other)
    found = list(demo.sweep(prompts, Heads(2), targets=[names[0]] * 6, contrasts=[names[1]] * 6))
    for prompt, result in zip(prompts, found, strict=True):
        same(result, demo.attribute(prompt, Heads(2), names[0], contrast=names[1]))


def test_a_batch_changes_nothing_and_is_no_larger_than_asked(demo, monkeypatch):
    prompts, sizes, compute = random_prompts(20, 1), [], rooms._results
    monkeypatch.setattr(rooms, "_results", lambda asked, batch: sizes.append(len(batch)) or compute(asked, batch))
    expected = list(demo.sweep(prompts, Tokens()))
    assert max(sizes) > 7
    for most in (1, 3, 7):
        sizes.clear()
        for one, other in zip(demo.sweep(prompts, Tokens(), batch_size=most), expected, strict=True):
            same(one, other, 1e-4)
        assert max(sizes) <= most and sum(sizes) == len(prompts)


def test_float64_is_exact_whatever_the_batch():
    dp = build("qwen2", torch.float64)
    prompts = [random_ids(n, seed=n) for n in (3, 9, 4, 8)]
    for prompt, result in zip(prompts, dp.sweep(prompts, Heads(layers="all")), strict=True):
        assert isinstance(result, LayeredAttribution)
        same(result, dp.attribute(prompt, Heads(layers="all")), 1e-12)


def test_failures_take_the_place_of_results(demo):
    prompts = ["Nyria Morstam speaks", "", [7] * 600, [10**6], "Nyria Morstam speaks", "Nyria"]
    targets = [None, None, None, None, " Italian Italian", b"x"]
    found = list(demo.sweep(prompts, Tokens(), targets=targets))
    assert [bool(one) for one in found] == [True, False, False, False, False, False]
    assert [one.error for one in found[1:]] == ["ValueError"] * 4 + ["TypeError"]
    assert [one.id for one in found[1:]] == ["1", "2", "3", "4", "5"]
    for failure, words in zip(
        found[1:], ("empty", "context is 512", "vocabulary", "2 tokens", "expected"), strict=True
    ):
        assert isinstance(failure, FailedPrompt) and words in failure.reason
    with pytest.raises(ValueError, match="prompt '1': prompt: empty"):
        list(demo.sweep(prompts, Tokens(), strict=True))


@pytest.mark.parametrize("error", [MemoryError("full"), torch.OutOfMemoryError("full"), FloatingPointError("NaN")])
def test_a_batch_that_fails_is_halved_until_the_prompt_is_alone(demo, monkeypatch, error):
    compute, bad = rooms._results, [7, 8, 9]

    def some(asked, batch):
        if any(prompt.ids.tolist() == bad for prompt in batch):
            raise error
        return compute(asked, batch)

    monkeypatch.setattr(rooms, "_results", some)
    prompts = random_prompts(10, 2)
    prompts[4] = bad
    found = list(demo.sweep(prompts, Tokens()))
    assert [bool(one) for one in found] == [i != 4 for i in range(10)]
    assert found[4].error == type(error).__name__ and found[4].reason == str(error)
    with pytest.raises(type(error), match="prompt '4'"):
        list(demo.sweep(prompts, Tokens(), strict=True))


def test_scores_that_are_no_numbers_are_a_failure(demo, monkeypatch):
    compute = rooms._results

    def poisoned(asked, batch):
        results = compute(asked, batch)
        for prompt, (result,) in zip(batch, results, strict=True):
            if prompt.item.id == "2":
                result.scores[0] = torch.nan
        return results

    monkeypatch.setattr(rooms, "_results", poisoned)
    found = list(demo.sweep(random_prompts(4), Tokens()))
    assert [bool(one) for one in found] == [True, True, False, True] and "NaN" in found[2].reason
    with pytest.raises(FloatingPointError, match="prompt '2'"):
        list(demo.sweep(random_prompts(4), Tokens(), strict=True))


def test_an_error_of_the_library_is_no_failure_of_a_prompt(demo, monkeypatch):
    def broken(asked, batch):
        raise KeyError("a bug")

    monkeypatch.setattr(rooms, "_results", broken)
    with pytest.raises(KeyError, match="a bug"):
        list(demo.sweep(random_prompts(2), Tokens()))


def test_what_all_prompts_share_is_checked_at_once(demo):
    with pytest.raises(ValueError, match="layer: 9 is out of range"):
        demo.sweep(["a"], Heads(9))
    with pytest.raises(TypeError, match="components: expected"):
        demo.sweep(["a"], "tokens")
    with pytest.raises(ValueError, match="temperature"):
        demo.sweep(["a"], Tokens(), temperature=-1.0)
    with pytest.raises(ValueError, match="method: 'adjoint' is for many"):
        demo.sweep(["a"], Tokens(), method="adjoint")
    with pytest.raises(ValueError, match="target_kind: 'x'"):
        demo.sweep(["a"], Tokens(), target_kind="x")
    with pytest.raises(ValueError, match="batch_size: expected a positive integer, got 0"):
        demo.sweep(["a"], Tokens(), batch_size=0)
    with pytest.raises(ValueError, match="shard: a sweep deals prompts to processes"):
        demo.sweep(["a"], Tokens(), shard=object())
    with pytest.raises(TypeError, match="unknown option 'tempreature'"):
        demo.sweep(["a"], Tokens(), tempreature=1.0)


def test_results_come_as_they_are_asked_for(demo):
    taken = []

    def endless():
        number = 0
        while True:
            taken.append(number)
            yield [5 + number % 7] * (5 + number % 9)
            number += 1

    asked = Asked(demo.adapter, demo.tokenizer, demo.options, Tokens())
    found = rooms.outcomes(asked, (Item(str(i), ids) for i, ids in enumerate(endless())), ordered=True)
    first = next(found)
    assert len(first) <= len(taken) <= 1 + 4 * 64
    found.close()


def test_a_target_without_its_space_is_doubted(demo):
    prompt = "Nyria Morstam speaks"
    with pytest.warns(InputWarning, match="no space in front"):
        list(demo.sweep([prompt], Tokens(), targets=["s"]))
    with pytest.warns(InputWarning, match="no space in front"):
        list(demo.sweep([prompt], Tokens(), targets=[" Italian"], contrasts=["s"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(demo.sweep([prompt], Tokens(), targets=[" Italian"]))
        list(demo.sweep([f"{prompt} ", f"{prompt}("], Tokens(), targets=["s", "s"]))
        list(demo.sweep([[5, 6]], Tokens(), positions=[0]))  # the second token is not carried


def test_chats_and_mappings_are_prompts_too(demo):
    ids = [5, 6, 7]
    mapped = list(demo.sweep([{"prompt": "Nyria Morstam speaks", "target": " Italian"}, {"prompt": ids}], Tokens()))
    same(mapped[0], demo.attribute("Nyria Morstam speaks", Tokens(), " Italian"))
    same(mapped[1], demo.attribute(ids, Tokens()))


def test_an_iterator_is_taken_as_results_are_asked_for(demo):
    taken = []

    def prompts():
        while True:
            taken.append([5] * (5 + len(taken) % 7))
            yield taken[-1]

    found = demo.sweep(prompts(), Tokens())
    same(next(found), demo.attribute(taken[0], Tokens()))
    assert len(taken) < 2000
    found.close()
    with pytest.raises(ValueError, match="targets: expected one per prompt, and there are only 1"):
        list(demo.sweep(iter([[5, 6], [7, 8]]), Tokens(), targets=[5]))


def test_tables_of_pandas_are_read_by_place_and_not_by_label(demo):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"prompt": [[5, 6], [7, 8, 9], [10, 11]], "target": [5, 6, 7]}).iloc[[2, 0, 1]]
    for found in (
        demo.sweep(table["prompt"], Tokens(), targets=table["target"]),
        demo.sweep(table, Tokens()),
    ):
        assert [(one.input_ids, one.target_ids) for one in found] == [([10, 11], [7]), ([5, 6], [5]), ([7, 8, 9], [6])]
    with pytest.raises(TypeError, match="targets: expected a list with one per prompt, got str"):
        demo.sweep([[5], [6]], Tokens(), targets="ab")


def test_a_warning_is_said_once(demo):
    with pytest.warns(InputWarning) as said:
        list(demo.sweep(["Nyria Morstam speaks"] * 5, Tokens(), targets=["s"] * 5))
    assert len(said) == 1


def test_a_target_without_its_space_that_is_no_token_gets_the_advice(demo):
    (found,) = demo.sweep(["Nyria Morstam speaks"], Tokens(), targets=["Italian"])
    assert not found and "--target-space" in found.reason
    (found,) = demo.sweep([[5, 6]], Tokens(), targets=[5], contrasts=[6], target_kind="log-prob")
    assert "target_kind is 'log-prob'" in found.reason
    (result,) = demo.sweep([[5, 6]], Tokens(), positions=[None])
    assert result.position == 1
