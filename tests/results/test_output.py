"""Results on terminals and pipes of any encoding: they are printed, whatever characters are lacking."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from depass_fast import Attribution, DePass, Heads, Tokens
from depass_fast.cli.main import main
from depass_fast.demo import load_demo
from depass_fast.results.render import plain
from depass_fast.runtime import progress
from depass_fast.runtime.terminal import encodable, escaping_output

ENCODINGS = ["cp1252", "cp437", "ascii", "utf-8"]


def strict(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)


@pytest.fixture(params=ENCODINGS)
def output(request, monkeypatch):
    """Make standard output a strict stream of an encoding, and return it; to be called inside a test."""

    def make() -> io.TextIOWrapper:
        monkeypatch.setattr(sys, "stdout", strict(request.param))
        return sys.stdout

    return make


def written(stream) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


@pytest.fixture(scope="module")
def result() -> Attribution:
    """A result with tokens that few encodings have."""
    found = DePass(*load_demo()).attribute("Nyria Morstam speaks", Tokens(), [None, (3, 5)])
    found.tokens[1:3] = ["日本", "é"]
    found.labels[1:3] = ["'日本'@1", "'é'@2"]
    found.target_names[1] = "'日' - 'β'"
    return found


def test_what_an_encoding_lacks():
    assert encodable("█▒▏ 日é", "ascii") == r"#-| \u65e5\xe9"
    assert encodable("█▒▏ 日é", "cp1252") == r"#-| \u65e5é"
    assert encodable("█▒▏ 日é", "cp437") == r"█▒| \u65e5é"
    assert encodable("█▒▏ 日é", "utf-8") == "█▒▏ 日é"
    assert encodable("\udc80", "utf-8") == r"\udc80"
    assert encodable("日", "no such codec") == "日"


def test_print(output, result):
    stream = output()
    heads = DePass(*load_demo()).attribute("Nyria Morstam speaks", Heads(layers="all"))
    for one in (result, heads, repr(result)):
        print(one)
    text = written(stream)
    assert ("█" in text) == (stream.encoding in ("cp437", "utf-8")) and ("#" in text) != ("█" in text)
    assert ("日本" in text) == (stream.encoding == "utf-8") and ("é" in text) == (stream.encoding != "ascii")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_continuation_on_a_rich_console(encoding):
    """The console's encoding counts, whatever standard output has."""
    console = pytest.importorskip("rich.console")
    dp, stream = DePass(*load_demo()), strict(encoding)
    found = dp.attribute("Nyria Morstam", Tokens(), continuation=" parle 日本")
    found.shares.tokens[-1] = "日"
    console.Console(file=stream, width=200, legacy_windows=False).print(found)
    text = written(stream)
    assert ("█" in text) == (encoding == "utf-8") and "log P of all" in text and "sum of log P of" in text
    assert r"\u65e5" in text or encoding == "utf-8"


def test_no_minus_before_zero():
    found = DePass(*load_demo()).attribute("Nyria Morstam", Tokens(), continuation=" speaks")
    found.log_probs[:] = -1e-5
    assert "log P of all 0.000" in str(found) and "-0.000" not in str(found)


def test_escaped_tokens_are_aligned(result):
    lines = plain(result, encoding="ascii").splitlines()
    head, shares = lines[4], lines[5]
    assert r"\u65e5\u672c" in head and len(head) == len(shares)
    assert plain(result, top=3, encoding="ascii").isascii()


def test_the_command_line_in_colour(output, monkeypatch, tmp_path):
    stream = output()
    monkeypatch.setenv("FORCE_COLOR", "1")
    asked = ["--prompt", "Nyria Morstam parle 日本", "--components", "tokens", "--out", str(tmp_path / "r.csv")]
    assert main(["attribute", "--model", "demo", "--device", "cpu", *asked]) == 0
    text = written(stream)
    assert "\x1b[" in text and ("█" in text or "#" in text) and (tmp_path / "r.csv").is_file()
    assert stream.errors == "strict"  # as it was


def test_output_is_escaped_within_the_context_only(monkeypatch):
    stream = strict("cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    with escaping_output():
        print("日")
    assert written(stream) == "\\u65e5" + os.linesep
    with pytest.raises(UnicodeEncodeError):
        print("日")


def test_the_progress_bar(monkeypatch):
    made = strict("cp1252")
    monkeypatch.setattr(made, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress_bar("layers", 3) as bar:
        bar.finish()
    assert "layers" in written(made)


def test_an_ascii_pipe():
    """In a process of its own, as Python makes its streams by the environment."""
    asked = [*("attribute", "--model", "demo", "--device", "cpu", "--components", "heads", "--layer", "1")]
    done = subprocess.run(
        [sys.executable, "-m", "depass_fast", *asked, "--prompt", "Nyria Morstam parle", "--top", "2"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "####" in done.stdout.decode("ascii")


def test_streams_without_an_encoding_are_left_alone(result, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with escaping_output():
        print(result)
    assert "日本" in sys.stdout.getvalue()
