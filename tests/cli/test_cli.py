"""The command line, run in-process on the demo model."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys

import pytest
import torch

from depass_fast import Attribution, DePass, Heads, Tokens, __version__
from depass_fast.cli.main import main
from depass_fast.demo import demo_path, demo_prompts, load_demo
from depass_fast.results.render import NEGATIVE, POSITIVE, token_line
from tests.support.command import ATTRIBUTE, fail, one_thread, run  # noqa: F401 (a fixture)

KEYS = {
    "input_ids": list,
    "components": str,
    "layer": int,
    "labels": list,
    "scores": list,
    "target_id": int,
    "target_logit": float,
    "position": int,
    "completeness_error": float,
    "backend": str,
    "device": str,
    "dtype": str,
    "seconds": float,
}
IOI = demo_prompts("ioi", count=1)[0]
FACT = next(p for p in demo_prompts("facts", language="en") if p.phrasing == 0)


@pytest.fixture(scope="module")
def engine():
    return DePass(*load_demo())


def run_json(capsys, *arguments: str) -> dict:
    """The one JSON object that ``attribute --json`` prints."""
    return json.loads(run(capsys, *ATTRIBUTE, *arguments, "--json"))


# -- results


@pytest.mark.parametrize("components", ["tokens", "heads", "modules", "neurons"])
def test_json_has_every_key_and_sums_to_the_logit(capsys, components):
    found = run_json(capsys, "--prompt", FACT.text, "--components", components, "--layer", "4")
    for key, kind in KEYS.items():
        assert type(found[key]) is kind, key
    assert len(found["scores"]) == len(found["labels"])
    assert sum(found["scores"]) == pytest.approx(found["target_logit"], rel=1e-4)
    assert found["completeness_error"] < 1e-5
    assert (found["components"], found["layer"], found["device"]) == (components, 4, "cpu")


@pytest.mark.parametrize("components", ["tokens", "heads", "modules", "neurons"])
def test_text_names_target_position_backend_and_error(capsys, components):
    out = run(capsys, *ATTRIBUTE, "--prompt", FACT.text, "--components", components, "--layer", "4")
    for expected in (repr(FACT.answer), "position", "logit", "torch on cpu", "completeness error"):
        assert expected in out
    if components == "neurons":
        assert "L4N" in out and "502 others" in out and "rest" in out and "sum" in out


def test_tokens_are_aligned_with_their_shares(capsys):
    out = run(capsys, *ATTRIBUTE, "--prompt", "Nyria Morstam speaks", "--components", "tokens").splitlines()
    tokens, shares = out[3], out[4]
    assert tokens.split()[0] == "<s>" and tokens.split()[-1] == "speaks"
    assert len(tokens) == len(shares) and len(shares.split()) == len(tokens.split())


def test_top(capsys):
    out = run(capsys, *ATTRIBUTE, "--prompt", FACT.text, "--components", "heads", "--layer", "5", "--top", "3")
    assert out.count("L5H") == 3 and "5 others" in out
    out = run(capsys, *ATTRIBUTE, "--prompt", FACT.text, "--components", "tokens", "--top", "1")
    assert out.count("█") + out.count("▒") == 24 and "others" in out


def test_colour_on_a_terminal(capsys, monkeypatch):
    arguments = [*ATTRIBUTE, "--prompt", FACT.text, "--components", "tokens"]
    assert "\x1b[" not in run(capsys, *arguments)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in run(capsys, *arguments)


def test_layers_default_to_0_for_tokens_and_count_from_the_end(capsys):
    assert run_json(capsys, "--prompt", FACT.text, "--components", "tokens")["layer"] == 0
    assert run_json(capsys, "--prompt", FACT.text, "--components", "heads", "--layer", "-1")["layer"] == 5


def test_layers_go_by_their_hooks_too(capsys):
    arguments = ["--prompt", FACT.text, "--components", "heads", "--layer"]
    named, numbered = (run_json(capsys, *arguments, layer) for layer in ("blocks.5.attn.hook_z", "5"))
    assert named["scores"] == numbered["scores"] and named["layer"] == 5


def test_input_ids_are_taken_as_they_are(capsys, engine):
    ids = engine.tokenizer.encode(FACT.text)
    found = run_json(capsys, "--input-ids", " ".join(map(str, ids)), "--components", "tokens")
    expected = engine.attribute(FACT.text, Tokens())
    assert found["input_ids"] == ids
    assert found["target_id"] == engine.tokenizer.encode(FACT.answer, add_special_tokens=False)[0]
    torch.testing.assert_close(torch.tensor(found["scores"]), expected.scores)


def test_contrast_is_a_logit_difference(capsys, engine):
    options = ["--prompt", IOI.text, "--components", "tokens", "--target", IOI.answer]
    found = run_json(capsys, *options, "--contrast", IOI.distractor)
    expected = engine.attribute(IOI.text, Tokens(), (IOI.answer, IOI.distractor))
    torch.testing.assert_close(torch.tensor(found["scores"]), expected.scores)
    assert found["contrast_id"] == expected.contrast_ids[0]
    by_id = run_json(capsys, *options, "--contrast-id", str(found["contrast_id"]))
    assert by_id["target_logit"] == found["target_logit"]
    assert "logit difference" in run(capsys, *ATTRIBUTE, *options, "--contrast", IOI.distractor)
    own = run_json(capsys, *options[:4], "--contrast", IOI.distractor)  # the model's own next token is the answer
    assert own["scores"] == pytest.approx(found["scores"], abs=1e-4)


def test_position_and_target_id(capsys, engine):
    found = run_json(
        capsys, "--prompt", IOI.text, "--components", "tokens", "--position", "3", "--target-id", "7", "--top", "1"
    )
    with torch.no_grad():
        logits = engine.model(torch.tensor([found["input_ids"]])).logits[0]
    assert (found["position"], found["target_id"]) == (3, 7)
    assert found["target_logit"] == pytest.approx(logits[3, 7].item(), abs=1e-4)
    assert not any(found["scores"][4:])  # later tokens cannot be seen from there


def test_options_reach_the_engine(capsys, engine):
    options = ["--allocation", "linear", "--no-exclude-special", "--backend", "reference", "--dtype", "float64"]
    found = run_json(capsys, "--prompt", FACT.text, "--components", "tokens", *options, "--memory-budget", "64M")
    assert (found["allocation"], found["backend"], found["dtype"]) == ("linear", "reference", "float64")
    assert found["completeness_error"] < 1e-12
    warm = run_json(capsys, "--prompt", FACT.text, "--components", "tokens", "--temperature", "10")
    assert warm["temperature"] == 10.0
    assert warm["scores"] != run_json(capsys, "--prompt", FACT.text, "--components", "tokens")["scores"]


def test_a_folder_is_loaded_like_the_demo(capsys):
    arguments = ["--prompt", FACT.text, "--components", "heads", "--layer", "2", "--json"]
    folder = json.loads(run(capsys, "attribute", "--model", str(demo_path()), "--device", "cpu", *arguments))
    demo = json.loads(run(capsys, *ATTRIBUTE, *arguments))
    assert folder["scores"] == pytest.approx(demo["scores"], abs=1e-5)
    assert folder["dtype"] == "float32"


def test_out_safetensors(capsys, tmp_path, engine):
    path = tmp_path / "heads.safetensors"
    run(capsys, *ATTRIBUTE, "--prompt", FACT.text, "--components", "heads", "--layer", "3", "--out", str(path))
    loaded, expected = Attribution.load(path), engine.attribute(FACT.text, Heads(3))
    torch.testing.assert_close(loaded.scores, expected.scores)
    assert loaded.labels == expected.labels


def test_out_csv(capsys, tmp_path):
    path = tmp_path / "tokens.csv"
    found = run_json(capsys, "--prompt", FACT.text, "--components", "tokens", "--out", str(path))
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["label", "score"]
    assert [label for label, _ in rows] == found["labels"]
    assert [float(score) for _, score in rows] == pytest.approx(found["scores"])


# -- rendering


def _render(result: Attribution) -> str:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as captured:
        console.print(result)
    return captured.get()


def test_colours_follow_sign_and_magnitude():
    line = token_line(["one", " two", " three", " four"], [4.0, -4.0, 2.0, 0.01])
    orange, blue = ("on rgb({},{},{})".format(*colour) for colour in (POSITIVE, NEGATIVE))
    styles = [str(span.style) for span in line.spans]
    assert line.plain == "one two three four"
    assert styles[0].endswith(orange) and styles[1].endswith(blue)
    assert styles[2] not in (styles[0], "") and len(styles) == 3  # the last is too faint for a colour


def test_several_targets_show_each(engine):
    result = engine.attribute(IOI.text, Tokens(), [IOI.answer, IOI.distractor, (IOI.answer, IOI.distractor)])
    for text in (str(result), _render(result)):
        assert text.count(" at position ") == 3
        for name in result.target_names:
            assert f"{name} at position" in text


def test_invisible_characters_and_long_prompts(engine):
    ids = engine.tokenizer.encode(IOI.text)
    result = engine.attribute((ids * 20)[:200], Tokens())
    assert len(str(result).splitlines()) < 20 and "others" in str(result)
    short = engine.attribute(ids, Tokens())
    short.tokens[3] = "\n\t"
    short.tokens[4] = " "
    text = str(short)
    assert r"\n\t" in text and "' '" in text
    wide = max(len(line) for line in text.splitlines()[2:])
    assert wide <= 100


# -- demo and doctor


def test_demo(capsys, tmp_path):
    picture = tmp_path / "demo.svg"
    out = run(capsys, "demo", "--svg", str(picture))
    for expected in (IOI.text, "leading heads", "leading neurons", "L0H", "completeness", "p = ", "--model demo"):
        assert expected.lower() in out.lower()
    assert torch.get_num_threads() == 1
    assert picture.read_text(encoding="utf-8").startswith("<svg")


def test_doctor(capsys):
    found = json.loads(run(capsys, "doctor", "--json"))
    assert found["depass_fast"] == __version__ and found["packages"]["torch"] == torch.__version__
    assert found["backends"]["reference"] == "ok" and found["devices"][0]["name"] == "cpu"
    assert found["auto"]["backend"] in found["backends"] and found["demo_model"] == "ok"
    text = run(capsys, "doctor")
    for expected in ("transformers", "device cpu", "backend reference", "backend auto"):
        assert expected in text


def test_module_runs_and_help_has_examples():
    done = subprocess.run([sys.executable, "-m", "depass_fast", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "examples:" in done.stdout and "attribute" in done.stdout


def test_help_and_version(capsys):
    assert __version__ in run(capsys, "--version")
    for command in ("demo", "doctor", "attribute", "graph", "report"):
        shown = run(capsys, command, "--help")
        assert "example" in shown
        assert ("3,8,-1" in shown) == (command in ("attribute", "report"))  # positions


# -- errors

ONE = ["--prompt", "Nyria Morstam speaks"]
TOKENS = [*ONE, "--components", "tokens"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*ONE, "--components", "heads"], ["--layer:", "0 to 5"]),
        ([*ONE, "--components", "heads", "--layer", "6"], ["--layer:", "6", "0 to 5"]),
        ([*ONE, "--components", "heads", "--layer", "x"], ["--layer:", "'x'", "attn.hook_z"]),
        ([*TOKENS, "--target", " Paris Nyria Morstam"], ["--target:", "tokens"]),
        ([*TOKENS, "--target-id", "999999"], ["--target-id:", "999999", "vocabulary"]),
        ([*TOKENS, "--target-id", "7", "--contrast", "a b"], ["--contrast:", "tokens"]),
        ([*TOKENS, "--target-id", "7", "--contrast-id", "-1"], ["--contrast-id:", "-1"]),
        ([*TOKENS, "--position", "99"], ["--position:", "99"]),
        ([*TOKENS, "--out", "scores.json"], ["--out:", ".safetensors", ".csv"]),
        ([*TOKENS, "--out", "no/such/folder/x.csv"], ["--out:", "folder"]),
        ([*TOKENS, "--input-ids", "1 5"], ["--input-ids", "--prompt"]),
        ([*TOKENS, "--dtype", "int8"], ["--dtype", "float32"]),
        ([*TOKENS, "--device", "cuda:99"], ["--device:", "cuda:99", "cpu"]),
        ([*TOKENS, "--backend", "abacus"], ["--backend:", "abacus", "reference"]),
        ([*TOKENS, "--allocation", "random"], ["--allocation/--rule:", "random", "softmax"]),
        ([*TOKENS, "--temperature", "0"], ["--temperature:", "0"]),
        ([*TOKENS, "--top", "0"], ["--top", "'0'"]),
        ([*TOKENS, "--memory-budget", "much"], ["--memory-budget", "'much'"]),
        (["--prompt", "", "--components", "tokens"], ["--prompt:", "empty"]),
        (["--input-ids", "", "--components", "tokens"], ["--input-ids:", "empty"]),
        (["--input-ids", "1 x", "--components", "tokens"], ["--input-ids:", "'x'"]),
        (["--input-ids", "1 999999", "--components", "tokens"], ["--input-ids:", "999999"]),
        (ONE, ["--components"]),
        (["--components", "tokens"], ["--prompt", "--input-ids"]),
        ([*ONE, "--components", "layers"], ["--components", "'layers'", "neurons"]),
    ],
)
def test_errors_name_the_argument(capsys, arguments, expected):
    message = fail(capsys, *ATTRIBUTE, *arguments)
    for part in expected:
        assert part in message


def test_errors_about_the_model(capsys, tmp_path):
    assert "--model:" in fail(capsys, "attribute", "--model", "./no_such_folder", *TOKENS)
    assert "config.json" in fail(capsys, "attribute", "--model", str(tmp_path), *TOKENS)
    shutil.copytree(demo_path(), tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing of use")
    fail(capsys, "attribute", "--model", str(tmp_path / "broken"), *TOKENS)
    (tmp_path / "config.json").write_text("{}")
    assert "--model:" in fail(capsys, "attribute", "--model", str(tmp_path), *TOKENS)


def test_no_command_and_wrong_suffix_of_the_picture(capsys):
    assert "attribute" in fail(capsys)
    assert "--svg:" in fail(capsys, "demo", "--svg", "demo.png")


def test_text_without_a_tokenizer(capsys, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(demo_path() / name, tmp_path)
    model = ["attribute", "--model", str(tmp_path), "--device", "cpu", "--components", "tokens"]
    assert "--input-ids" in fail(capsys, *model, "--prompt", "x")
    assert "--target-id" in fail(capsys, *model, "--input-ids", "1 5", "--target", "x")
    assert json.loads(run(capsys, *model, "--input-ids", "1 5", "--json"))["labels"] == ["'1'@0", "'5'@1"]


def test_what_goes_wrong_inside_is_no_error_of_the_user(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(DePass, "attribute", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main([*ATTRIBUTE, *TOKENS])


def test_interrupt(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(DePass, "attribute", interrupted)
    assert main([*ATTRIBUTE, *TOKENS]) == 130


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="position"):
        main([*ATTRIBUTE, *TOKENS, "--position", "99", "--debug"])


def test_neurons_of_all_layers(capsys, tmp_path):
    arguments = ["--prompt", FACT.text, "--components", "neurons", "--layer", "all"]
    found = run_json(capsys, *arguments, "--method", "adjoint", "--refine", "20", "--sample", "20")
    assert found["method"] == "adjoint" and found["estimate"]["sample"] and len(found["layers"]) == 6
    assert [one["layer"] for one in found["layers"]] == list(range(6))
    out = run(capsys, *ATTRIBUTE, *arguments, "--method", "exact", "--top", "3", "--out", str(tmp_path / "all.csv"))
    assert "neurons at 6 layers | exact" in out and len((tmp_path / "all.csv").read_text().splitlines()) > 3000


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--components", "tokens", "--layer", "all"], ["--layer:", "tokens"]),
        (["--components", "neurons", "--layer", "0", "--method", "quick"], ["--method:", "'quick'"]),
        (["--components", "neurons", "--layer", "0", "--refine", "-3"], ["--refine:", "-3"]),
        (["--components", "neurons", "--layer", "0", "--refine-within", "x"], ["--refine-within:", "'x'"]),
        (["--components", "neurons", "--layer", "0", "--method", "exact", "--seed", "1"], ["--seed:", "adjoint"]),
        (["--components", "tokens", "--method", "adjoint"], ["--method:", "tokens"]),
    ],
)
def test_errors_about_the_method(capsys, arguments, parts):
    error = fail(capsys, *ATTRIBUTE, "--prompt", FACT.text, *arguments)
    assert all(part in error for part in parts), error


def test_a_plan_for_another_machine(capsys):
    where = ["--device", "cuda", "--gemm-tflops", "790"]
    main(["plan", "--model", "demo", "--length", "40", "--components", "neurons", "--json", *where])
    made = json.loads(capsys.readouterr().out)
    assert (made["layer"], made["device"], made["available_bytes"]) == (0, "cuda", None)
    assert {"torch", "triton", "torch, streamed"} <= {one["backend"] for one in made["estimates"]}


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        ("config.json", {"num_hidden_layers": "six"}, ["num_hidden_layers"]),
        ("config.json", {"hidden_size": 64}, ["shapes", "config.json"]),
        ("tokenizer.json", {"version": "1.0"}, ["cannot be loaded", "Error"]),
    ],
)
def test_a_folder_that_contradicts_itself(capsys, tmp_path, file, content, parts):
    folder = _copy_with(tmp_path, file, content)
    message = fail(capsys, "attribute", "--model", str(folder), "--device", "cpu", *TOKENS)
    assert all(part in message for part in ["--model:", *parts]), message


def test_weights_that_are_random_are_warned_of(capsys, tmp_path):
    folder = _copy_with(tmp_path, "config.json", {"num_hidden_layers": 7})
    assert main(["attribute", "--model", str(folder), "--device", "cpu", *TOKENS]) == 0
    warned = capsys.readouterr().err
    assert "depass-fast: warning: model:" in warned and "model.layers.6." in warned and "random" in warned


def _copy_with(tmp_path, file, content):
    """The folder of the demo model with some entries of one JSON file replaced."""
    folder = tmp_path / "model"
    shutil.copytree(demo_path(), folder)
    before = json.loads((folder / file).read_text()) if file == "config.json" else {}
    (folder / file).write_text(json.dumps(before | content))
    return folder
