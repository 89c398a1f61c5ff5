"""--model takes a GGUF file, in every command; an error about it is one line that names --model."""

import json

import pytest

from depass_fast.demo import demo_path
from tests.support.command import fail, one_thread, run  # noqa: F401 (a fixture)
from tests.support.gguf_file import needs_gguf, write_gguf
from tests.support.models import build

IDS = [36, 34, 35]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", build("llama-gqa").model))


@needs_gguf
def test_every_command_loads_it(file, capsys):
    found = json.loads(run(capsys, *_tokens(file), "--json"))
    assert found["input_ids"][-3:] == IDS and found["provenance"]["model"] == file
    assert "L1H3" in run(capsys, "ledger", "--model", file, "--prompt", "CAB", "--device", "cpu")
    assert "'C'@" in run(
        capsys, "generate", "--model", file, "--prompt", "CAB", "--device", "cpu", "--max-new-tokens", "1"
    )


@needs_gguf
def test_a_plan_reads_its_header_and_its_tokenizer(file, capsys):
    plan = ["plan", "--model", file, "--components", "heads", "--layer", "1", "--device", "cpu", "--gemm-tflops", "1"]
    of_text, *of_lengths = (
        json.loads(run(capsys, *plan, *given, "--json"))["flop"]
        for given in (("--prompt", "CAB"), ("--length", "3"), ("--length", "4"))
    )
    assert of_text in of_lengths  # transformers 4 begins with <s>
    assert "--layer: 9 is out of range; this model has layers 0 to" in fail(
        capsys, *plan[:4], "heads", "--layer", "9", "--length", "3"
    )


@needs_gguf
def test_files_that_cannot_be_loaded(file, tmp_path, capsys):
    picture, cut = str(tmp_path / "clip.gguf"), tmp_path / "cut.GGUF"
    write_gguf(tmp_path / "clip.gguf", build("llama-gqa").model, architecture="clip")
    with open(file, "rb") as whole:
        cut.write_bytes(whole.read(2000))
    plan = ["--components", "tokens", "--length", "3"]
    assert "error: --model: " in (said := fail(capsys, "plan", "--model", picture, *plan)) and "clip" in said
    assert "error: --model: " in (said := fail(capsys, *_tokens(str(cut)))) and "cannot be loaded (" in said
    assert "error: --model: " in (said := fail(capsys, "ledger", "--model", str(cut), "--prompt", "A"))
    assert said.count("cannot be loaded") == 1


def test_what_is_no_gguf_file(tmp_path, capsys):
    said = fail(capsys, *_tokens("no.gguf"))
    assert "--model: there is no file 'no.gguf'; give a model folder, a GGUF file, a hub name, or demo" in said
    (tmp_path / "b.gguf").write_bytes(b"GGML")
    assert "b.gguf is no GGUF file: it begins with b'GGML'" in fail(capsys, *_tokens(str(tmp_path / "b.gguf")))
    said = fail(capsys, *_tokens(str(tmp_path)))
    assert "it holds no config.json; of the GGUF files in it give one, such as" in said and "b.gguf" in said
    said = fail(capsys, *_tokens(str(demo_path() / "config.json")))
    assert "is no model folder, and its name does not end in .gguf" in said


def test_packages_that_are_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("depass_fast.inputs.gguf_files.find_spec", lambda name: None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    said = fail(capsys, *_tokens(str(tmp_path / "m.gguf")))
    assert (
        "error: --model: " in said and "needs gguf and accelerate to load one: pip install 'depass-fast[gguf]'" in said
    )


def _tokens(model: str) -> list[str]:
    return ["attribute", "--model", model, "--prompt", "CAB", "--components", "tokens", "--device", "cpu"]
