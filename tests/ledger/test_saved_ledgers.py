"""A ledger's file: the same answers from it, and which files and models are refused."""

import copy
import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from depass_fast import Attribution, Continuation, Contrast, Custom, DePass, Features, Heads, LogProb, Neurons, Tokens
from tests.support.components import Dictionary, kinds
from tests.support.family_models import build_model, build_variant
from tests.support.ledgers import distance, flat
from tests.support.models import build, random_ids

IDS, OTHER = random_ids(7), random_ids(4, seed=1)
ERROR = {"completeness_error": 0.0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.safetensors"


def rewrite(path, change):
    """Change a file's tensors and its metadata, whose content is plain: ``change(tensors, metadata, content)``."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    content = json.loads(metadata["json"])
    change(tensors, metadata, content)
    save_file(tensors, str(path), metadata=metadata | {"json": json.dumps(content)})


def assert_same_answers(found, ledger, asked):
    for kind in asked:
        for one, other in zip(flat(found.scores(kind)), flat(ledger.scores(kind)), strict=True):
            assert distance(one, other) <= 1e-6 and one.labels == other.labels
            assert one.target_kinds == other.target_kinds
            assert one.how() | ERROR == other.how() | ERROR and torch.equal(one.target_logits, other.target_logits)
    assert repr(found) == repr(ledger) and abs(found.completeness_error - ledger.completeness_error) < 1e-6
    assert [one.label for one in found.top(7)] == [one.label for one in ledger.top(7)]


@pytest.mark.parametrize("name", ["llama-biases", "qwen2"])
def test_a_loaded_ledger_answers_alike(name, path):
    dp = build(name)
    ledger = dp.ledger(IDS, [3, LogProb(5), Contrast(1, 2), torch.ones(32)], rule="half")
    ledger.save(path)
    assert_same_answers(dp.load_ledger(path), ledger, kinds(len(IDS)).values())
    with pytest.raises(ValueError, match="states"):
        dp.load_ledger(path).custom(0, torch.ones(5, 1, 32))


@pytest.mark.parametrize("prompts", [[IDS, OTHER, IDS[:5]], [OTHER]])
@pytest.mark.parametrize("position", [-1, [2, 0, -1]])
def test_a_ledger_of_several_prompts_and_positions(prompts, position, path):
    dp = build("mistral-window", torch.float64)
    ledger = dp.ledger(prompts, targets=[[1, 2], 3, LogProb()][: len(prompts)], position=position)
    ledger.save(path)
    loaded = dp.load_ledger(path)
    assert_same_answers(loaded, ledger, [Tokens(1), Heads(layers="all"), Neurons(2)])
    loaded.save(path)
    assert_same_answers(dp.load_ledger(path), ledger, [Tokens()])


@pytest.mark.parametrize(
    "variant", ["qwen2_moe", "gpt_oss", "gpt_neox: parallel", "opt: stream norms, projected embedding"]
)
def test_a_ledger_of_experts_parallel_layers_and_stream_norms(variant, path):
    dp = DePass(build_variant(variant))
    ledger = dp.ledger([IDS, OTHER], 5)
    ledger.save(path)
    kind = Features(1, Dictionary(size=8), "resid_post")
    assert_same_answers(dp.load_ledger(path), ledger, [Tokens(), Heads(layers="all"), Neurons(layers="all"), kind])


def test_more_than_ten_mlps_of_a_layer_keep_their_order(path):
    experts = {"num_key_value_heads": 2, "num_local_experts": 14, "num_experts_per_tok": 3, "num_hidden_layers": 1}
    dp = DePass(build_model("mixtral", **experts))
    ledger = dp.ledger(random_ids(12), 5)
    ledger.save(path)
    assert_same_answers(dp.load_ledger(path), ledger, [Neurons(0)])


def test_a_path_that_cannot_be_written(tmp_path, monkeypatch):
    ledger = build("llama-gqa").ledger(IDS, 5)
    heads, nowhere = ledger.heads(1), tmp_path / "no" / "x.safetensors"
    (tmp_path / "file").touch()
    for one in (ledger, heads, ledger.heads()):
        with pytest.raises(FileNotFoundError, match=r"x\.safetensors: there is no folder '.*no'; make it"):
            one.save(nowhere)
        with pytest.raises(NotADirectoryError, match=r"file.x: '.*file' is a file, and no folder"):
            one.save(str(tmp_path / "file" / "x"))
        with pytest.raises(IsADirectoryError, match="it is a folder; give the path of a file"):
            one.save(tmp_path)
    monkeypatch.setattr("depass_fast.ledger.book.save", None)  # before any work
    with pytest.raises(FileNotFoundError):
        ledger.save(nowhere)


def test_what_the_system_refuses_is_an_error_with_the_path(path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("no space left")

    monkeypatch.setattr("depass_fast.results.files.save_file", full)
    with pytest.raises(OSError, match=r"ledger\.safetensors: it cannot be written \(no space left\)"):
        build("llama-gqa").ledger(IDS, 5).save(path)


def test_options_are_those_of_the_ledger(path):
    dp = build("llama-gqa")
    ledger = dp.ledger(IDS, 5, rule="taylor", state_dtype=torch.float64, compute_dtype=torch.float64)
    ledger.save(path)
    found = DePass(dp.model, allocation="softmax", exclude_special=False).load_ledger(path).heads(1)
    assert torch.equal(found.scores, ledger.heads(1).scores)
    assert (found.allocation, found.state_dtype, found.compute_dtype) == ("taylor", "float64", "float64")


def test_another_model_is_refused_with_what_differs(path):
    build("llama-gqa").ledger(IDS, 5).save(path)
    for other, reason in (
        (build("llama-gqa", seed=1), "whose weight"),
        (build("llama-mha"), "num_key_value_heads"),
        (build("qwen2"), "Qwen2"),
    ):
        with pytest.raises(ValueError, match=f"ledger of another model, .*{reason}"):
            other.load_ledger(path)
    edited = DePass(copy.deepcopy(build("llama-gqa").model))
    assert edited.load_ledger(path).heads(0).labels[0] == "L0H0"
    with torch.no_grad():
        edited.model.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    with pytest.raises(ValueError, match=r"ledger of another model, .*up_proj"):
        edited.load_ledger(path)


def test_other_files_are_refused_with_what_reads_them(path, tmp_path):
    dp = build("llama-gqa")
    dp.ledger(IDS, 5).save(path)
    for load in (Attribution.load, Continuation.load):
        with pytest.raises(ValueError, match=r"not a saved attribution .*load_ledger\(path\) of the model's DePass"):
            load(path)
    dp.attribute(IDS, Tokens()).save(path)
    with pytest.raises(ValueError, match=r"not a saved ledger .*Attribution\.load\(path\) reads it"):
        dp.load_ledger(path)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        dp.load_ledger(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        dp.load_ledger(tmp_path / "nothing")
    save_file({"x": torch.ones(1)}, str(path))
    with pytest.raises(ValueError, match="not a saved ledger"):
        dp.load_ledger(path)


def test_a_later_format_and_a_damaged_file_are_refused(path):
    dp = build("llama-gqa")
    ledger = dp.ledger(IDS, 5)

    def later(tensors, metadata, content):
        metadata["format"] = "depass_fast.ledger.v7"

    ledger.save(path)
    rewrite(path, later)
    with pytest.raises(ValueError, match=r"format 7 of depass_fast.ledger, .* up to format 1; .*pip install -U"):
        dp.load_ledger(path)
    for change in (
        lambda tensors, metadata, content: tensors.pop("seeds"),
        lambda tensors, metadata, content: tensors.pop("directions.0.vectors"),
        lambda tensors, metadata, content: content.pop("reads"),
        lambda tensors, metadata, content: content["directions"][0].pop("names"),
    ):
        ledger.save(path)
        rewrite(path, change)
        with pytest.raises(ValueError, match=r"ledger\.safetensors: damaged, depass_fast\.ledger\.v1"):
            dp.load_ledger(path)


def test_a_custom_component_is_asked_of_a_loaded_ledger(path):
    dp, states = build("llama-gqa"), torch.ones(7, 2, 32)
    dp.ledger(IDS, 5).save(path)
    assert dp.load_ledger(path).custom(1, states).labels[:2] == dp.attribute(IDS, Custom(1, states)).labels[:2]
