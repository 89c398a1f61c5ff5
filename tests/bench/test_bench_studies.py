"""The other studies of bench/: grouped attribution, prompts per second, and the page made of their results."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from bench.baselines.published import Published
from bench.core.questions import Question
from bench.report import __main__ as report
from bench.speed import prompts, scripts
from bench.studies import faithfulness, grouping
from bench.studies.ablation import __main__ as race
from bench.studies.ablation.race import verify
from bench.studies.ablation.subject import NeuronRace
from depass_fast import DePass, Neurons
from tests.support.family_models import build_model
from tests.support.models import random_ids

ROOT = Path(__file__).parents[2]
TARGET = 5


def question() -> tuple[DePass, Question]:
    model = build_model("llama", num_key_value_heads=2)
    model.config._attn_implementation = "eager"
    return DePass(model), Question("", torch.tensor(random_ids(6)), TARGET)


@pytest.mark.parametrize("count", [1, 3, 48])
def test_grouped_scores_are_those_of_the_published_groups(count: int) -> None:
    """The published gate overrides and residual are left out: they have nothing to do with grouping."""
    library, asked = question()
    published = Published(library.model, corrected=True)
    expected = published.score(published.neurons(asked.ids, 0, groups=count), -1, TARGET)[1:]
    groups = grouping.split(48, count, "contiguous")
    actual = grouping.grouped_scores(library, asked.ids, 0, groups, TARGET, rows=100)  # several batches of groups
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    exact = library.attribute(asked.ids, Neurons(0), TARGET).scores[:48]
    error = grouping.compare(actual, exact)["relative_error"]
    assert error < 1e-5 if count == 1 else error > 1e-3


def test_groups_hold_every_neuron_once() -> None:
    for kind in ("contiguous", "random"):
        groups = grouping.split(50, 8, kind, seed=3)
        assert sorted(torch.cat(groups).tolist()) == list(range(50))
        assert {len(group) for group in groups} == {6, 7}
    assert not torch.equal(groups[0], grouping.split(50, 8, "contiguous")[0])


def test_a_batch_that_differs_is_not_timed(monkeypatch) -> None:
    library = prompts.DePass
    work = prompts.PromptList("llama-tiny", "tokens", prompts=2)
    assert len(list(prompts.measure(work, runs=1))) == 2

    class Wrong(library):
        def attribute(self, prompt, *args, **kwargs):
            results = super().attribute(prompt, *args, **kwargs)
            if isinstance(results, list):
                results[0].scores[0] += 1.0
            return results

    monkeypatch.setattr(prompts, "DePass", Wrong)
    with pytest.raises(RuntimeError, match="differ by"):
        list(prompts.measure(work, runs=1))


def test_scripts_that_differ_are_not_timed(monkeypatch, tmp_path) -> None:
    out, page = tmp_path / "scripts.json", tmp_path / "RESULTS.md"
    scripts.main(["--tiny", "--kinds", "attn", "--length", "4", "--out", str(out)])
    report.main([str(out), "--out", str(page)])
    assert "| attention of every layer, N=4 | compat, one by one | llama-tiny |" in page.read_text()
    monkeypatch.setattr(scripts, "AGREE", 0.0)
    with pytest.raises(RuntimeError, match=r"compat, layer 0: it is .* off the published"):
        scripts.main(["--tiny", "--kinds", "attn"])


def test_quality_is_measured_again_without_the_race(monkeypatch, tmp_path, capsys) -> None:
    old = json.loads((ROOT / "bench/results/ablation-cpu.json").read_text())
    other = {metric: {"all": {"median": 0.5}, "layers": [{"median": 0.25}]} for metric in ("spearman", "top1_overlap")}
    new = {"quality": {"depass_fast": {"zero": other}}, "n_prompts": 3, "quality_environment": {"commit": "new"}}
    monkeypatch.setattr(race, "measure_quality", lambda count, device: new)
    path = tmp_path / "ablation.json"
    path.write_text(json.dumps(old))
    race.main(["--only", "quality", "--out", str(path)])
    found = json.loads(path.read_text())
    assert found["environment"] == old["environment"] and {**old, **new, "rows": found["rows"]} == found
    assert [row["seconds"] for row in found["rows"]] == [row["seconds"] for row in old["rows"]]
    mine = [row for row in found["rows"] if row["model"] == "demo" and row["provider"] == "depass_fast"]
    assert [row["spearman"]["zero"]["median"] for row in mine] == [0.25, 0.5]
    with pytest.raises(SystemExit):
        race.main(["--only", "quality"])
    assert "give it as --out FILE" in capsys.readouterr().err


def test_an_ablation_that_differs_is_not_timed(monkeypatch) -> None:
    subject = NeuronRace("llama-tiny", all_layers=True, length=5).build()
    verify(subject)
    monkeypatch.setattr("bench.baselines.fair_ablation._normed", lambda x, norm: x)
    with pytest.raises(RuntimeError, match="ablations differ"):
        verify(subject)


def test_rankings_hold_every_neuron_of_every_layer() -> None:
    """Attribution patching is the slope of the logit, here with all activations made smaller at once."""
    library, asked = question()
    found = faithfulness.rankings(library, asked.ids, TARGET, seed=0)
    assert {scores.shape for scores in found.values()} == {(3, 48)}
    assert all(scores.isfinite().all() and not scores.requires_grad for scores in found.values())

    def logit(factor: float) -> torch.Tensor:
        with ExitStack() as undo, torch.no_grad():
            for layer in library.model.model.layers:
                hook = layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: (factor * args[0],))
                undo.callback(hook.remove)
            return library.model(asked.ids[None]).logits[0, -1, TARGET]

    slope = (logit(1.01) - logit(0.99)) / 0.02
    torch.testing.assert_close(found["attribution patching"].sum(), slope, rtol=0.01, atol=1e-3)


def test_the_page_has_a_section_for_every_result(tmp_path) -> None:
    prompts.main(
        ["--tiny", "--runs", "1", "--threads", "1", "--only", "heads", "--out", str(tmp_path / "prompts.json")]
    )
    suite = {
        "machine_info": {
            "environment": {"device": "a CPU", "threads": 2, "date": "2026-01-01", "commit": "0"},
            "shape": {"hidden": 8, "intermediate": 16, "layers": 2},
        },
        "benchmarks": [
            {
                "group": "readout",
                "params": {"backend": "torch", "targets": 64},
                "stats": {"median": 0.2, "q1": 0.1, "q3": 1.5, "rounds": 3},
            }
        ],
    }
    (tmp_path / "suite.json").write_text(json.dumps(suite))
    page = tmp_path / "RESULTS.md"
    report.main([str(tmp_path / "prompts.json"), str(tmp_path / "suite.json"), "--out", str(page)])
    text = page.read_text()
    assert "## Prompts per second" in text
    assert "| heads of layer 0 | one jagged batch | llama-tiny | 4 |" in text
    assert "| readout | torch | targets 64 | 200 ms | [100 ms, 1.5 s] | 3 |" in text
