"""Saved results: they say what made them, keep what they do not know, and are refused where their format is newer."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from depass_fast import (
    Adjoint,
    Attribution,
    Continuation,
    DePass,
    Generation,
    Heads,
    LayeredAttribution,
    Neurons,
    Tokens,
    __version__,
)
from depass_fast.demo import load_demo
from depass_fast.inputs.provenance import provenance_of
from tests.support.models import build, random_ids

IDS = random_ids(5)
# since version 0.1.0
NEW = (
    "exclude_special",
    "state_dtype",
    "compute_dtype",
    "site",
    "end",
    "sweep",
    "provenance",
    "reduced",
    "target_kinds",
)


@pytest.fixture(scope="module")
def results() -> list[Attribution | LayeredAttribution]:
    dp = build("qwen2")
    return [
        dp.attribute(IDS, Tokens(), verify=True),
        dp.attribute(IDS, Heads(layers="all"), [3, 5]),
        dp.attribute(IDS, Neurons(layers="all"), method=Adjoint(refine=2, sample=4, seed=3)),
    ]


def read(path) -> tuple[dict[str, torch.Tensor], str, dict]:
    """The tensors, the format and the content of a file."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        return {key: file.get_tensor(key) for key in file.keys()}, metadata["format"], json.loads(metadata["json"])  # noqa: SIM118


def write(path, tensors, name, content) -> None:
    save_file(tensors, str(path), metadata={"format": name, "json": json.dumps(content)})


def same(one, other) -> bool:
    """True if two results hold the same."""
    if isinstance(one, LayeredAttribution):
        return (one.estimate, one.warnings, one.unknown) == (other.estimate, other.warnings, other.unknown) and all(
            map(same, one, other)
        )
    return all(
        torch.equal(value, vars(other)[name]) if isinstance(value, torch.Tensor) else value == vars(other)[name]
        for name, value in vars(one).items()
    )


def test_a_result_says_what_made_it(results, tmp_path):
    tokens, heads, neurons = results
    dp = build("qwen2")
    assert (tokens.exclude_special, heads.exclude_special) == ([0], [])
    assert (tokens.state_dtype, tokens.compute_dtype, tokens.site, tokens.end) == (
        "float32",
        "float32",
        "resid_pre",
        None,
    )
    assert heads.by_layer[0].site == "resid_mid" and heads.by_layer[0].sweep is None
    assert neurons.by_layer[1].sweep == {"refine": 2, "within": "all", "sample": 4, "seed": 3}
    for result in results:
        made = result.provenance
        assert made == provenance_of(dp.adapter)
        assert (made.model_type, made.model_class, made.revision) == ("qwen2", "Qwen2ForCausalLM", None)
        assert (made.depass_fast, made.torch, made.adapters) == (__version__, str(torch.__version__), [])
        assert result.to_dict()["provenance"] == result.how()["provenance"] == dataclasses.asdict(made)
        result.save(tmp_path / "r.safetensors")
        assert same(Attribution.load(tmp_path / "r.safetensors"), result)


def test_what_a_result_was_asked_for_is_told_apart(tmp_path):
    dp, told, scores = DePass(*load_demo()), [], []
    for options in ({}, {"exclude_special": False}, {"exclude_special": [1, -1]}, {"state_dtype": "float64"}):
        result = dp.attribute("Nyria Morstam speaks", Tokens(), **options)
        scores.append(result.score("' speaks'@4"))
        result.save(tmp_path / "r.safetensors")
        _, _, content = read(tmp_path / "r.safetensors")
        told.append(
            [str(result).split("completeness")[0], repr(result).split("completeness")[0], result.how(), content]
        )
    assert len(set(scores)) == len(scores)
    for several in zip(*told, strict=True):
        plain = [
            one if isinstance(one, str) else json.dumps({**one, "seconds": 0, "completeness_error": 0})
            for one in several
        ]
        assert len(set(plain)) == len(plain)
    assert [content["exclude_special"] for *_, content in told[:3]] == [[0], [], [1, 4]]
    assert "no special tokens kept out" in told[1][0] and "(state float64, products float64)" in told[3][0]


def test_the_model_of_a_folder_and_of_the_hub():
    model, tokenizer = load_demo()
    model.config._name_or_path, model.config._commit_hash = "some/model", "0123456789abcdef"
    model.config.quantization_config = {"quant_method": "awq"}
    made = provenance_of(DePass(model, tokenizer).adapter)
    assert (made.model, made.revision, made.quantisation) == ("some/model", "0123456789abcdef", "awq")
    assert str(made).startswith(f"some/model at 0123456789ab, depass_fast {__version__}")


def test_files_of_the_first_version_load(results, tmp_path):
    path = tmp_path / "r.safetensors"
    for result in results:
        result.save(path)
        tensors, name, content = read(path)
        for part in content.get("layers", [content]):
            assert all(part.pop(field, None) is None or True for field in NEW) and not set(NEW) & set(part)
        write(path, tensors, name, content)
        loaded = Attribution.load(path)
        assert torch.equal(loaded.scores, result.scores) and loaded.estimate == result.estimate
        assert (loaded.provenance, loaded.exclude_special, loaded.end) == (None, None, None)
        assert "made with" not in repr(loaded) and str(loaded)
        loaded.save(path)
        assert same(Attribution.load(path), loaded)


def test_unknown_fields_are_kept(results, tmp_path):
    path = tmp_path / "r.safetensors"
    for result in results:
        result.save(path)
        tensors, name, content = read(path)
        content["mood"] = {"of": ["the", 1]}
        tensors["more"] = torch.arange(3)
        for part in content.get("layers", [content]):
            part["weather"] = None
            part["provenance"]["planet"] = "earth"
        if content.get("estimate"):
            content["estimate"]["kendall"] = 0.5
        if content.get("verification"):
            content["verification"]["by"] = "hand"
        write(path, tensors, name, content)
        loaded = Attribution.load(path)
        assert torch.equal(loaded.scores, result.scores) and loaded.provenance == result.provenance
        loaded.save(path)
        again = read(path)
        assert again[1:] == (name, content)
        assert again[0].keys() == tensors.keys() and all(torch.equal(again[0][key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("components", [Neurons(1), Neurons(layers="all")])
def test_a_continuations_unknown_fields_are_kept(components, tmp_path):
    path = tmp_path / "c.safetensors"
    found = build("qwen2").attribute(IDS, components, continuation=[7, 9], method=Adjoint(refine=2, sample=4))
    found.save(path)
    tensors, name, content = read(path)
    content["estimate"]["kendall"] = 0.5
    for part in content["layers"]:
        part["weather"] = None
        if part["estimate"]:
            part["estimate"]["kendall"] = 0.5
    write(path, tensors, name, content)
    loaded = Continuation.load(path)
    assert loaded.shares.estimate == found.shares.estimate is not None
    loaded.save(path)
    assert read(path)[1:] == (name, content)


def test_generations_are_saved_too(tmp_path):
    path = tmp_path / "g.safetensors"
    generation = build("qwen2").attribute_generation(IDS, max_new_tokens=3)
    generation.save(path)
    tensors, name, content = read(path)
    write(path, tensors | {"more": torch.ones(2)}, name, content | {"mood": [1]})
    for _ in range(2):
        loaded = Generation.load(path)
        assert all(map(same, loaded.steps, generation.steps)) and torch.equal(loaded.scores, generation.scores)
        assert str(loaded) == str(generation) and loaded.unknown.keys() == {"mood", "more"}
        loaded.save(path)
    with pytest.raises(ValueError, match="not a saved attribution"):
        LayeredAttribution.load(path)


def test_a_damaged_file_is_refused_with_its_path(results, tmp_path):
    path = tmp_path / "damaged.safetensors"
    given = build("qwen2").attribute(IDS, Tokens(), continuation=[3])
    for result, missing in ((results[0], "labels"), (results[1], "layers"), (given, "prompt_length")):
        result.save(path)
        tensors, name, content = read(path)
        write(path, tensors, name, {key: value for key, value in content.items() if key != missing})
        with pytest.raises(ValueError, match=rf"damaged\.safetensors: damaged, {name} has other parts .*{missing}"):
            Attribution.load(path)
    for metadata in ({"format": name, "json": "{"}, {"format": name, "json": "[]"}, {"format": name}):
        save_file(tensors, str(path), metadata=metadata)
        with pytest.raises(ValueError, match=r"damaged\.safetensors: damaged, "):
            Attribution.load(path)


def test_a_newer_format_is_refused_by_its_number(results, tmp_path):
    path = tmp_path / "r.safetensors"
    results[0].save(path)
    tensors, name, content = read(path)
    assert name == "depass_fast.attribution.v1"
    write(path, tensors, "depass_fast.attribution.v3", content)
    with pytest.raises(ValueError, match=rf"format 3 of depass_fast.attribution, .*{__version__} reads up to format 1"):
        Attribution.load(path)
    write(path, tensors, "depass_fast.layers.v2", content)
    with pytest.raises(ValueError, match=r"format 2 of depass_fast.layers.*pip install -U depass-fast"):
        LayeredAttribution.load(path)


def test_tables_carry_how_they_were_made(results, tmp_path):
    pytest.importorskip("pandas")
    for result in results:
        assert result.to_dataframe().attrs == result.how()
    generation = build("qwen2").attribute_generation(IDS, max_new_tokens=2)
    attrs = generation.to_dataframe().attrs
    assert attrs["exclude_special"] == [0] and "position" not in attrs
    generation.to_csv(tmp_path / "g.csv")
    lines = (tmp_path / "g.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "position,token,label,score,log_prob_score" and len(lines) == 1 + len(generation.to_dataframe())
    assert json.loads(json.dumps(generation.to_dict()))["steps"][1]["exclude_special"] == [0]


def test_columns_of_tables_differ():
    dp = build("qwen2")
    result = dp.attribute(IDS, Heads(1), [3, 4, (3, 5), 3])
    result.target_names[:] = ["'is'", "'is'", "'is' - 'a'", "'is'"]
    assert result.columns()[0] == ["label", "'is' (id 3) #1", "'is' (id 4)", "'is' - 'a'", "'is' (id 3) #2"]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("gpt2", "gpt2"),
        ("/home/somebody/models/mine/", "mine"),
        ("/home/somebody/models/mine.Q4_1.gguf", "mine.Q4_1.gguf"),
        ("C:\\Users\\somebody\\mine", "mine"),
        ("./mine", "mine"),
        ("models/mine", "mine"),
        (None, None),
    ],
)
def test_files_for_others_name_no_folder(model, name, tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    made = dataclasses.replace(provenance_of(build("qwen2").adapter), model=model)
    assert made.name == name
    assert made.told().startswith(f"{name or 'Qwen2ForCausalLM'}, depass_fast ")
