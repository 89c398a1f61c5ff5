"""Bars appear on a terminal after two seconds, and nowhere else; they change no number."""

import io
import threading
import warnings
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from depass_fast import DePass, Neurons, Tokens
from depass_fast.cli.main import main
from depass_fast.options import Adjoint
from depass_fast.results.estimate import ApproximationWarning
from depass_fast.runtime import progress
from tests.support.family_models import build_variant
from tests.support.models import build, random_ids


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def stands_for_stderr(monkeypatch, stream):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    return stream


@pytest.fixture
def terminal(monkeypatch):
    return stands_for_stderr(monkeypatch, Terminal())


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    monkeypatch.setattr(progress, "_PAUSE", 0.0)


def test_a_bar_on_a_terminal(terminal, at_once):
    dp, ids = build("llama-gqa"), random_ids(9)
    expected = dp.attribute(ids, Tokens(), 7, progress=False)
    assert not terminal.getvalue()
    result = dp.attribute(ids, Tokens(), 7)
    assert "layers" in terminal.getvalue() and "100%" in terminal.getvalue()
    assert (result.scores == expected.scores).all()


def test_no_bar_within_two_seconds(terminal):
    build("llama-gqa").attribute(random_ids(9), Tokens(), 7)
    assert not terminal.getvalue()


def test_no_bar_without_a_terminal(monkeypatch, at_once):
    stream = stands_for_stderr(monkeypatch, io.StringIO())
    build("llama-gqa").attribute(random_ids(9), Tokens(), 7)
    assert not stream.getvalue()


def test_quiet(terminal, at_once, capsys):
    command = ["attribute", "--model", "demo", "--prompt", "Nyria Morstam speaks", "--components", "tokens", "--json"]
    assert main([*command, "--quiet"]) == 0
    assert not terminal.getvalue()
    assert main(command) == 0
    assert "layers" in terminal.getvalue()


def test_the_bar_goes_after_an_error(terminal, at_once):
    with pytest.raises(KeyError), progress.progress_bar("layers", 3) as shown:
        shown.finish()
        raise KeyError
    with progress.progress_bar("layers", 3) as shown:
        assert shown is not None and not progress._terminal.locked()


def test_threads_have_bars_of_their_own(terminal, at_once):
    dp, ids = build("llama-gqa"), random_ids(9)
    trace = dp.trace(ids)
    expected, results = dp.attribute(trace, Tokens(), 7).scores, []
    threads = [
        threading.Thread(target=lambda: results.append(dp.attribute(trace, Tokens(), 7).scores)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all((scores == expected).all() for scores in results)
    assert not progress._terminal.locked()


@pytest.fixture
def drawn(monkeypatch, terminal, at_once):
    """Every bar that was drawn: its label, its total, how far it had come."""
    bars = {}

    class Watched(progress.ProgressBar):
        def draw(self, part):
            super().draw(part)
            bars.setdefault(self, []).append(self.done + part)

    monkeypatch.setattr(progress, "ProgressBar", Watched)
    return bars


def only(bars, label, total):
    """The one bar that there was after the forward pass, from its beginning to its end."""
    ((shown, way),) = [(shown, way) for shown, way in bars.items() if shown.label != "forward pass"]
    assert (shown.label, shown.total) == (label, total)
    assert way == sorted(way) and way[-1] == total
    return way


@pytest.mark.parametrize(
    ("method", "options"),
    [("adjoint", {}), (Adjoint(refine=0), {}), (Adjoint(sample=0), {}), ("adjoint", {"memory_budget": 1})],
)
def test_a_sweep_has_one_bar_for_all_prompts(drawn, terminal, options, method):
    dp, prompts = build("llama-gqa"), [random_ids(9), random_ids(5)]
    call = partial(dp.attribute, prompts, Neurons(layers="all"), 7, method=method, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        expected = call(progress=False)
        assert not drawn and not terminal.getvalue()
        found = call()
    way = only(drawn, "prompts", 2)
    assert max(b - a for a, b in pairwise([0.0, *way])) <= 0.51  # layer by layer: at most half of a prompt at once
    for one, other in zip(found, expected, strict=True):
        assert (one.scores == other.scores).all()


def test_a_way_back_has_one_bar_of_its_layers(drawn, terminal):
    dp, prompts = build("llama-gqa"), [random_ids(9), random_ids(5)]
    call = partial(dp.attribute, prompts, Neurons(layers="all"), 7, allocation="taylor")
    expected = call(progress=False)
    assert not drawn and not terminal.getvalue()
    found = call()
    way = only(drawn, "layers", 1)
    assert max(b - a for a, b in pairwise([0.0, *way])) <= 1 / dp.adapter.n_layers + 0.01
    assert all((one.scores == other.scores).all() for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["llama: GQA", "gptj"])
def test_the_forward_pass_has_a_bar_of_its_layers(drawn, name):
    """The first one also runs the model as it is; a model without pluggable attention runs prompt by prompt."""
    dp, prompts = DePass(build_variant(name)), [random_ids(9), random_ids(5)]
    hooks = [len(block._forward_hooks) for block in dp.adapter.blocks]
    passes = 2 if dp.adapter.one_by_one else 1
    for times in (passes + 1, passes):
        drawn.clear()
        trace = dp.trace(prompts)
        ((shown, way),) = drawn.items()
        assert (shown.label, way) == ("forward pass", list(range(1, 3 * times + 1))) and shown.total == 3 * times
    drawn.clear()
    dp.attribute(trace, Tokens(), 7)
    assert [shown.label for shown in drawn] == ["layers"]  # the trace was there already
    assert [len(block._forward_hooks) for block in dp.adapter.blocks] == hooks


@pytest.mark.parametrize("kind", [Tokens(), Neurons(0)])
def test_the_forward_pass_is_silent_where_that_was_asked_for(drawn, kind):
    build("llama-gqa").attribute(random_ids(9), kind, 7, progress=False)
    DePass(build("llama-gqa").model, progress=False).trace(random_ids(9))
    assert not drawn


def test_only_this_threads_forward_pass_counts(drawn):
    module = torch.nn.Identity()
    with progress.progress_bar_of_calls("forward pass", [module], 1, True):
        other = threading.Thread(target=module, args=(torch.zeros(1),))
        other.start()
        other.join()
        assert not drawn
        module(torch.zeros(1))
    assert [way for way in drawn.values()] == [[1]] and not module._forward_hooks


def test_generation_has_a_bar_of_its_tokens(drawn, terminal):
    dp, ids = build("llama-gqa"), random_ids(9)
    expected = dp.attribute_generation(ids, max_new_tokens=4, progress=False)
    assert not drawn and not terminal.getvalue()
    calls = []

    def mine(input_ids, scores, **_):
        calls.append(input_ids.shape)
        return input_ids.new_zeros(len(input_ids), dtype=bool)

    found = dp.attribute_generation(ids, max_new_tokens=4, generation={"stopping_criteria": [mine]})
    assert found.input_ids == expected.input_ids and len(calls) == 4
    tokens, _, layers = drawn
    assert (tokens.label, tokens.total, drawn[tokens]) == ("tokens", 4, [1, 2, 3, 4])
    assert layers.label == "layers" and not progress._terminal.locked()


def test_focus_has_one_bar_for_all_layers(drawn):
    dp, ids = build("llama-gqa"), random_ids(9)
    partition = dp.partition(ids, Neurons(0), progress=False)
    dp.focus(ids, Neurons(0), [3], partition=partition)
    only(drawn, "layers", 2)
