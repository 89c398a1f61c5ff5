"""A GGUF file is a model with its tokenizer; what cannot be loaded from one is refused before any work."""

import pytest
import torch

from depass_fast import DePass, Tokens, WeightsWarning
from depass_fast.inputs import gguf_files
from tests.support.gguf_file import needs_gguf, write_gguf
from tests.support.models import build

IDS = [36, 34, 35]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Small.GGUF", build("llama-gqa").model)


@pytest.fixture
def installed(monkeypatch):
    """Have all packages that GGUF files need."""
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: name)


@needs_gguf
def test_a_file_is_its_model_and_its_tokenizer(file, tmp_path):
    dp = DePass.from_pretrained(str(file))
    result = dp.attribute("CAB", Tokens())
    assert result.input_ids[-3:] == IDS and result.tokens[-3:] == ["C", "A", "B"]  # transformers 4 begins with <s>
    expected = build("llama-gqa").attribute(result.input_ids, Tokens())
    assert torch.equal(result.scores, expected.scores) and result.dtype == "float32"
    assert DePass(dp.model, file).tokenizer.encode("CAB") == result.input_ids
    made = result.provenance
    assert (made.model, made.revision, made.model_type, made.quantisation) == (str(file), None, "llama", None)
    result.save(tmp_path / "result")


@needs_gguf
def test_dtypes_and_ways_to_name_it(file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.chdir(file.parent)
    for path, dtype, more in (
        ("~/Small.GGUF", "bfloat16", None),
        (file.parent, "auto", {"gguf_file": file.name}),
        (file.parent.parent, None, {"gguf_file": file.name, "subfolder": file.parent.name}),
    ):
        dp = DePass.from_pretrained(path, dtype=dtype, model_kwargs=more)
        assert dp.adapter.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        assert dp.model.config._name_or_path == str(file) and dp.tokenizer.encode("CAB")[-3:] == IDS


@needs_gguf
def test_a_file_of_that_name_in_the_working_directory_is_another(file, tmp_path, monkeypatch):
    write_gguf(tmp_path / file.name, build("llama-gqa", seed=1).model)
    monkeypatch.chdir(tmp_path)
    for path, more in ((file, None), (file.parent, {"gguf_file": file.name})):
        model = DePass.from_pretrained(path, model_kwargs=more).model
        assert torch.equal(model.lm_head.weight, build("llama-gqa").model.lm_head.weight)
    model = DePass.from_pretrained(file.name).model
    assert torch.equal(model.lm_head.weight, build("llama-gqa", seed=1).model.lm_head.weight)


@needs_gguf
def test_the_header_is_read_once(file, monkeypatch):
    import gguf as package

    reads, reader = [], package.GGUFReader
    monkeypatch.setattr(package, "GGUFReader", lambda path: reads.append(path) or reader(path))
    patched = package.GGUFReader
    DePass.from_pretrained(file)
    assert reads == [str(file)] and package.GGUFReader is patched


@needs_gguf
def test_files_that_transformers_cannot_load(file, tmp_path):
    model = build("llama-gqa").model
    picture = write_gguf(tmp_path / "clip.gguf", model, architecture="clip")
    with pytest.raises(ValueError, match=r"path: .*clip.gguf is of an architecture that transformers \d.* \(.*clip"):
        DePass.from_pretrained(picture)
    with pytest.raises(ValueError, match="tokenizer: none could be loaded from .*clip.gguf': .*architecture"):
        DePass(model, picture)
    whole = file.read_bytes()
    for size in (10, 2000, len(whole) // 2):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="path: .*cut.gguf cannot be loaded .* damaged or cut short, copy it"):
            DePass.from_pretrained(cut)
    lacking = write_gguf(tmp_path / "lacking.gguf", model, left_out="model.layers.0.mlp.up_proj.weight")
    with pytest.warns(
        WeightsWarning, match="lacking.gguf does not hold model.layers.0.mlp.up_proj.weight, as its head"
    ):
        DePass.from_pretrained(lacking)


def test_what_is_no_file(tmp_path, installed):
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    for path in (tmp_path / "no.gguf", str(tmp_path / "no.gguf")):
        with pytest.raises(
            FileNotFoundError, match="path: there is no file '.*no.gguf'.* holds other.gguf. .*repository"
        ):
            DePass.from_pretrained(path)
    with pytest.raises(FileNotFoundError, match="path: there is no file '.*no.gguf'"):
        DePass.from_pretrained(tmp_path, model_kwargs={"gguf_file": "no.gguf"})
    with pytest.raises(ValueError, match="tokenizer: none could be loaded from '.*no.gguf': there is no file"):
        DePass(build("llama-gqa").model, str(tmp_path / "no.gguf"))


def test_what_is_no_gguf_file(tmp_path, installed):
    file = tmp_path / "pointer.gguf"
    file.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(
        ValueError, match="path: .*pointer.gguf is no GGUF file: it begins with b'vers', not with b'GGUF'"
    ):
        DePass.from_pretrained(file)
    part = tmp_path / "model-00001-of-00003.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="is one of 3 parts .* join them with `llama-gguf-split --merge`"):
        DePass.from_pretrained(part)
    whole = tmp_path / "model-00001-of-00001.gguf"
    whole.write_bytes(b"GGUF")
    assert gguf_files.located(whole, {})[0] == str(tmp_path)


def test_arguments_about_the_hub(tmp_path, installed):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    for name in ("revision", "subfolder"):
        with pytest.raises(ValueError, match=f"model_kwargs: {name}='main' is about a repository of the hub"):
            DePass.from_pretrained(file, model_kwargs={name: "main"})
    with pytest.raises(ValueError, match="model_kwargs: gguf_file='m.gguf' beside a path that is a file itself"):
        DePass.from_pretrained(file, model_kwargs={"gguf_file": "m.gguf"})
    found = gguf_files.located(file, {"revision": None, "token": "t"})
    assert found == (str(tmp_path), {"revision": None, "token": "t", "gguf_file": str(file)})
    for path in ("a/hub-name.gguf", "a/hub-name"):
        given = {"gguf_file": "m.gguf", "revision": "x"}
        assert gguf_files.located(path, given) == (path, given)
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    assert gguf_files.located(str(folder), {}) == (str(folder), {})


@pytest.mark.parametrize(("missing", "named"), [({"gguf"}, "gguf"), ({"gguf", "accelerate"}, "gguf and accelerate")])
def test_packages_that_are_missing(missing, named, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None if name in missing else name)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    for path, more in ((file, None), ("a/hub-name", {"gguf_file": "m.gguf"})):
        advice = (
            rf"m.gguf is a GGUF file, and transformers needs {named} to load one: pip install 'depass-fast\[gguf\]'"
        )
        with pytest.raises(ImportError, match=advice):
            DePass.from_pretrained(path, model_kwargs=more)
