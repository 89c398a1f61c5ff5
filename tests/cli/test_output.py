"""Printing and writing: where one fails, the other goes on."""

from __future__ import annotations

import io
import json
import sys
import warnings

import pytest

from depass_fast import Attribution, CompletenessWarning, DePass
from depass_fast.cli.errors import with_flags
from depass_fast.cli.main import main
from tests.support.command import ATTRIBUTE, one_thread, run  # noqa: F401 (a fixture)

PROMPTS = ["--prompt", "Nyria", "--prompt", "Nyria Morstam", "--prompt", "Nyria Morstam speaks"]
TOKENS = [*ATTRIBUTE, *PROMPTS, "--components", "tokens", "--batch-size", "2"]
GENERATE = ["generate", "--model", "demo", "--device", "cpu", "--prompt", "Nyria Morstam", "--max-new-tokens", "1"]


class Broken(io.StringIO):
    """A stream that takes one text, and then no more."""

    def __init__(self, error: OSError):
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        if "\n" in self.getvalue():
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    ("error", "code"), [(BrokenPipeError(32, "Broken pipe"), 0), (OSError(28, "No space left on device"), 2)]
)
def test_a_pipe_without_a_reader_loses_nothing_of_out(capsys, monkeypatch, tmp_path, error, code):
    out = tmp_path / "shares.jsonl"
    monkeypatch.setattr(sys, "stdout", Broken(error))
    assert main([*TOKENS, "--out", str(out)]) == code
    assert len(out.read_text().splitlines()) == 3
    assert ("standard output: " in capsys.readouterr().err) == bool(code)
    monkeypatch.setattr(sys, "stdout", Broken(error))
    assert main([*GENERATE, "--out", str(out)]) == code
    assert len(out.read_text().splitlines()) == 1
    monkeypatch.setattr(sys, "stdout", Broken(error))
    assert main(TOKENS) == code


def test_a_file_that_cannot_be_written_loses_nothing_of_what_is_printed(capsys, monkeypatch, tmp_path):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Attribution, "to_csv", full)
    arguments = [*TOKENS, "--out", str(tmp_path / "shares.csv")]
    assert main([*arguments, "--json"]) == 2
    captured = capsys.readouterr()
    assert len([json.loads(line) for line in captured.out.splitlines()]) == 3 and "No space left" in captured.err
    monkeypatch.setattr(sys, "stdout", Broken(BrokenPipeError(32, "Broken pipe")))
    assert main(arguments) == 2  # nowhere are all results


def test_streams_that_are_closed(monkeypatch, tmp_path):
    out = tmp_path / "shares.jsonl"
    monkeypatch.setattr(sys, "stdout", None)
    assert main([*TOKENS, "--out", str(out)]) == 0 and len(out.read_text().splitlines()) == 3
    monkeypatch.setattr(sys, "stderr", None)
    assert main([*GENERATE, "--out", str(out)]) == 0 and main([*GENERATE, "--max-new-tokens", "0"]) == 2


def test_messages_are_no_results(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["attribute"]) == 2
    assert capsys.readouterr().out == ""


def test_advice_is_given_in_flags(capsys, monkeypatch):
    from depass_fast.adjoint.estimate import _ADVICE

    attribute = DePass.attribute

    def warned(*args, **kwargs):
        warnings.warn(_ADVICE, UserWarning, stacklevel=1)
        results = attribute(*args, **kwargs)
        for result in results:
            result.warnings = [_ADVICE]
        return results

    monkeypatch.setattr(DePass, "attribute", warned)
    assert main(TOKENS) == 0
    captured = capsys.readouterr()
    advice = "refine more of every layer, as --refine 256 --refine-within layer, or take --method exact"
    assert advice in captured.err and captured.out.count(f"WARNING: {advice}") == 3
    assert main([*ATTRIBUTE, "--prompt", "a", "--components", "tokens", "--target", " Nyria Morstam"]) == 2
    assert "Several tokens are given to `depass-fast attribute --continuation`." in capsys.readouterr().err
    sweep = "give method=Adjoint(refine=0, sample=0) or backend='torch'; see Adjoint(...), continuation=1"
    assert with_flags(sweep) == "give --refine 0 --sample 0 or --backend torch; see Adjoint(...), continuation=1"


def test_a_warning_that_the_result_holds_is_not_said_twice(capsys, monkeypatch):
    attribute = DePass.attribute

    def warned(*args, **kwargs):
        warnings.warn("completeness: off", CompletenessWarning, stacklevel=1)
        return attribute(*args, **kwargs)

    monkeypatch.setattr(DePass, "attribute", warned)
    assert main(TOKENS) == 0
    assert "completeness: off" not in capsys.readouterr().err
