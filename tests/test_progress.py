"""Bars appear on a terminal after two seconds, and nowhere else; they change no number."""

import io
import threading
from types import SimpleNamespace

import pytest
from conftest import build, random_ids

from depass_fast import Tokens, progress
from depass_fast.cli import main


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
    with pytest.raises(KeyError), progress.bar("layers", 3) as shown:
        shown.finish()
        raise KeyError
    with progress.bar("layers", 3) as shown:
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
