"""docs/evaluation.md: made from the committed results and texts, and up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.report import evaluation
from depass_fast.evaluate.catalog import ENTRIES
from depass_fast.evaluate.run import FORMAT

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "bench/results/evaluate").glob("*.json"))


def test_the_page_is_made_from_the_committed_results():
    made = evaluation.page(*evaluation.read(RESULTS))
    assert (ROOT / "docs/evaluation.md").read_text(encoding="utf-8") == made


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_is_whole_and_names_nothing_of_its_machine(path):
    text = path.read_text(encoding="utf-8")
    found = json.loads(text)
    assert found["benchmark"] == "evaluate" and found["format"] == FORMAT and not found["quick"]
    assert len(found["rows"]) == found["prompts"] and found["versions"]["torch"]
    assert not any(word in text for word in ("/root", "/home", "/tmp"))


def test_a_study_has_results_of_both_models_or_is_said_to_have_none():
    ran = {(found["study"], found["model"]["name"].split()[0].split("-")[0]) for found in map(_result, RESULTS)}
    assert ran == {(study, model) for study, _ in ran for model in ("SmolLM2", "Gemma")}
    missing = [entry.name for entry in ENTRIES if (entry.name, "Gemma") not in ran]
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    assert (f"Not run on these models yet: {', '.join(f'`{name}`' for name in missing)}." in page) == bool(missing)
    texts = {path.stem for path in (ROOT / "bench/results/evaluate").glob("*.md")}
    assert texts >= {"introduction", *(entry.name for entry in ENTRIES)}


def test_a_command_is_the_one_that_made_the_result():
    result = _result(next(path for path in RESULTS if path.stem == "tokens-smollm2-known"))
    assert evaluation.command_of("name", result) == (
        "depass-fast evaluate tokens --model FILE.gguf --data known_1000.json --name SmolLM2-135M-Instruct "
        f"--prompts {result['wanted']} --out name.json"
    )
    half = evaluation.command_of(
        "n", result | {"seed": 3, "layers": [0, 2], "model": {"name": "A B", "dtype": "bfloat16"}}
    )
    assert '--name "A B" --layers 0,2 --dtype bfloat16 --prompts' in half and "--seed 3 --out n.json" in half


def _result(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
