"""`dp.sweep_to` and `Sweep`: what is in the folder, what is refused, what is done again."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from depass_fast import Adjoint, Custom, Heads, Neurons, PromptSet, Sweep, Tokens
from depass_fast.sweep import folder as rooms
from depass_fast.sweep.dealing import Share
from depass_fast.sweep.folder import DENSE, ERRORS, SCORES, at_work, shards
from depass_fast.sweep.rows import COLUMNS
from tests.support.sweeps import failed_of, random_prompts, rows_of, write_prompts

pandas = pytest.importorskip("pandas")


def test_rows_are_the_scores(demo, tmp_path):
    prompts = random_prompts(12)
    run = demo.sweep_to(tmp_path / "run", prompts, Heads(layers="all"), targets=[[5, 7]] * 12, ids=list("abcdefghijkl"))
    frame = run.to_pandas()
    assert tuple(frame.columns) == COLUMNS and run.is_complete and len(frame) == 12 * 2 * 6 * 9
    for name, ids in zip("abcdefghijkl", prompts, strict=True):
        result = demo.attribute(ids, Heads(layers="all"), [5, 7])
        own = frame[frame["prompt"] == name]
        assert own["completeness_error"].max() < 1e-5 and own["warnings"].isna().all()
        for target in range(2):
            of_target = own[own["target_number"] == target]
            assert (of_target["target"] == result.target_names[target]).all()
            assert np.allclose(of_target["target_logit"], float(result.target_logits[target]), atol=1e-4)
            sums = of_target.groupby("layer", observed=True)["score"].sum()
            assert np.allclose(sums, float(result.target_logits[target]), atol=1e-3), "every layer sums to the logit"
            heads = of_target[of_target["component"] == "head"].set_index("label")["score"]
            assert np.allclose([heads[label] for label in result.labels], result.scores_of(target), atol=1e-3)


@pytest.mark.parametrize("kind", [Tokens(), Heads(layers="all"), Neurons(2)])
def test_with_top_the_sums_stay(demo, tmp_path, kind):
    prompts = random_prompts(8)
    whole = demo.sweep_to(tmp_path / "all", prompts, kind).to_pandas()
    few = demo.sweep_to(tmp_path / "few", prompts, kind, top=3).to_pandas()
    keys = ["prompt", "layer"]
    sums = [one.groupby(keys, observed=True)["score"].sum() for one in (whole, few)]
    assert np.allclose(sums[0], sums[1], atol=1e-3)
    named = {"tokens": "token", "heads": "head", "neurons": "neuron"}[kind.kind]
    for prompt, own in few[few["component"] == named].groupby("prompt", observed=True):
        of_all = whole[(whole["prompt"] == prompt) & (whole["component"] == named)]
        largest = of_all["score"].abs().nlargest(3)
        assert len(own) == 3 and sorted(own["score"].abs()) == pytest.approx(sorted(largest), abs=1e-3)
    assert set(few["component"]) - {named} <= {"rest", "bias", "others"} and "others" in set(few["component"])


def test_a_component_that_is_named_others_is_one(demo, tmp_path):
    import torch

    kind = Custom(0, states=torch.randn(7, 2, 128), labels=["others", "x"])
    frame = demo.sweep_to(tmp_path / "run", [[5] * 7], kind).to_pandas()
    assert dict(zip(frame["label"], frame["component"], strict=True))["others"] == "custom"


def test_means_standard_errors_and_leading_counts(demo, tmp_path):
    run = demo.sweep_to(tmp_path / "run", random_prompts(20), Heads(layers=[1, 3]), shard_prompts=6)
    assert len(shards(tmp_path / "run", SCORES)) > 2
    frame, found = run.to_pandas(), run.mean(top=4)
    of = frame[frame["label"] == "L3H2"]["score"].astype(float)
    row = found[found["label"] == "L3H2"].iloc[0]
    assert row["n"] == 20 and row["mean"] == pytest.approx(of.mean())
    assert row["standard_error"] == pytest.approx(of.std(ddof=1) / 20**0.5)
    assert row["mean_magnitude"] == pytest.approx(of.abs().mean())
    heads = frame[frame["component"] == "head"]
    leading = heads.assign(size=heads["score"].abs()).sort_values("size").groupby("prompt", observed=True).tail(4)
    counts = leading["label"].value_counts()
    for one in found.itertuples():
        assert one.top == (counts.get(one.label, 0) if one.component == "head" else 0)
    label, mean = run.top(1)[0]
    assert abs(mean) == found[found["component"] == "head"]["mean"].abs().max() and label in counts
    assert np.isnan(demo.sweep_to(tmp_path / "one", [[5, 6, 7]], Heads(2)).mean()["standard_error"]).all()


def test_dense_scores_are_all_scores(demo, tmp_path):
    prompts = random_prompts(9)
    run = demo.sweep_to(tmp_path / "run", prompts, Tokens(), targets=[[5, 7]] * 9, dense=True, top=1, shard_prompts=4)
    found = {one.prompt: one for one in run.dense()}
    for number, ids in enumerate(prompts):
        result, one = demo.attribute(ids, Tokens(), [5, 7]), found[str(number)]
        assert one.labels == result.labels and one.targets == result.target_names
        assert (one.scores - result.scores).abs().max() < 1e-3
    orphan = tmp_path / "run" / DENSE / "0123456789abcdef.safetensors"
    orphan.write_bytes(shards(tmp_path / "run", DENSE)[0].read_bytes())
    assert len(list(run.dense())) == 9, "a dense file without its table was left by a process that was killed"
    with pytest.raises(ValueError, match="wrote no dense scores"):
        demo.sweep_to(tmp_path / "plain", prompts, Tokens()).dense()


def test_failures_are_rows_with_their_reason_and_are_not_tried_again(demo, tmp_path):
    data = PromptSet.read(write_prompts(tmp_path / "x.jsonl", 10, bad=(3, 8)))
    run = demo.sweep_to(tmp_path / "run", data, Tokens())
    assert (run.n_done, run.n_failed, run.is_complete) == (10, 2, True)
    errors = run.errors()
    assert sorted(errors["prompt"]) == ["p3", "p8"] == sorted(failed_of(tmp_path / "run"))
    assert set(errors["error"]) == {"ValueError"} and errors["reason"].str.contains("vocabulary").all()
    assert "10 of 10 prompts done, 2 of them failed" in repr(run)
    before = sorted((tmp_path / "run").rglob("*"))
    demo.sweep_to(tmp_path / "run", data, Tokens())
    assert sorted((tmp_path / "run").rglob("*")) == before
    for path in shards(tmp_path / "run", ERRORS):
        path.unlink()  # as docs/scale.md says
    assert demo.sweep_to(tmp_path / "run", data, Tokens()).n_failed == 2
    with pytest.raises(ValueError, match="prompt 'p3'"):
        demo.sweep_to(tmp_path / "strict", data, Tokens(), strict=True)


def test_a_second_start_does_the_rest_and_changes_nothing(demo, tmp_path, monkeypatch):
    data = PromptSet.read(write_prompts(tmp_path / "x.jsonl", 30))
    whole = rows_of(demo.sweep_to(tmp_path / "whole", data, Tokens()).folder)
    seen: list[str] = []

    def interrupt(line: str) -> None:
        seen.append(line)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.sweep_to(tmp_path / "run", data, Tokens(), shard_prompts=4, batch_size=4, report=interrupt)
    half = Sweep.open(tmp_path / "run")
    assert half.n_done == 12 and not half.is_complete
    again: list[str] = []
    done = demo.sweep_to(tmp_path / "run", data, Tokens(), report=again.append)
    assert done.is_complete and again[-1].startswith("shard 1: 18 prompts; 30 of 30 prompts, ")
    rows = rows_of(tmp_path / "run")
    assert rows.keys() == whole.keys() and all(abs(rows[key] - whole[key]) < 1e-3 for key in rows)


def test_ctrl_c_keeps_what_is_finished(demo, tmp_path, monkeypatch):
    from depass_fast.sweep import outcomes

    compute, batches = outcomes._results, []

    def some(asked, batch):
        batches.append(len(batch))
        if len(batches) == 4:
            raise KeyboardInterrupt
        return compute(asked, batch)

    monkeypatch.setattr(outcomes, "_results", some)
    with pytest.raises(KeyboardInterrupt):
        demo.sweep_to(tmp_path / "run", random_prompts(30), Tokens(), batch_size=5)
    assert Sweep.open(tmp_path / "run").n_done == sum(batches[:3])


def test_a_run_of_other_options_is_refused_with_what_differs(demo, tmp_path):
    prompts, folder = random_prompts(3), tmp_path / "run"
    demo.sweep_to(folder, prompts, Heads(layers=[1, 2]))
    cases = [
        ((prompts, Heads(layers=[1, 3])), {}, r"components.layers is \[1, 2\]; here it is \[1, 3\]"),
        ((prompts, Tokens()), {}, "components.kind is 'heads'; here it is 'tokens'"),
        ((prompts[:2], Heads(layers=[1, 2])), {}, "data.prompts is 3; here it is 2"),
        ((prompts[::-1], Heads(layers=[1, 2])), {}, "data.sha256"),
        ((prompts, Heads(layers=[1, 2])), {"allocation": "half"}, "options.allocation is 'softmax'"),
        ((prompts, Heads(layers=[1, 2])), {"temperature": 0.5}, "options.temperature is 0.1; here it is 0.5"),
        ((prompts, Heads(layers=[1, 2])), {"state_dtype": "float64"}, "options.state_dtype"),
        ((prompts, Heads(layers=[1, 2])), {"target_kind": "log-prob"}, "target_kind is 'logit'"),
        ((prompts, Heads(layers=[1, 2])), {"top": 5}, "output.top is None; here it is 5"),
        ((prompts, Heads(layers=[1, 2])), {"method": "exact"}, "method is None; here it is 'exact'"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=f"out: .*{message}"):
            demo.sweep_to(folder, *arguments, **options)
    demo.sweep_to(folder, prompts, Heads(layers=[1, 2]), memory_budget=1 << 24, batch_size=1, progress=False)


def test_other_weights_or_another_dictionary_are_another_run(demo, tmp_path):
    import torch

    prompts, folder = [[5] * 7], tmp_path / "run"
    states = torch.randn(7, 2, 128)
    demo.sweep_to(folder, prompts, Custom(0, states=states))
    with pytest.raises(ValueError, match="components.tensors"):
        demo.sweep_to(folder, prompts, Custom(0, states=states * 2))
    weight = demo.model.model.layers[2].mlp.up_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[3, 5] += 1
    try:
        with pytest.raises(ValueError, match="model.weights"):
            demo.sweep_to(folder, prompts, Custom(0, states=states))
    finally:
        with torch.no_grad():
            weight.copy_(before)
    demo.sweep_to(folder, prompts, Custom(0, states=states))


def test_what_is_asked_of_an_adjoint_sweep_is_in_the_manifest(demo, tmp_path):
    run = demo.sweep_to(tmp_path / "run", [[5, 6, 7]], Neurons(layers="all"), method=Adjoint(refine=2, sample=0), top=5)
    held = json.loads((run.folder / "manifest.json").read_text())
    assert held["method"] == {"refine": 2, "within": "all", "sample": 0, "seed": 0}
    assert held["model"]["model_type"] == "llama" and held["versions"]["depass_fast"] and held == run.manifest
    assert len(run.to_pandas()) == 5 + 6 * 2, "rest and others of six layers"


def test_a_folder_that_is_none(demo, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no sweep"):
        Sweep.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="out: .* is a file"):
        demo.sweep_to(tmp_path / "file", [[5]], Tokens())
    for text, message in (("{", "damaged"), ('{"format": "depass_fast.sweep.v9"}', "its format is")):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Sweep.open(tmp_path)


def test_a_disk_without_room_is_told_before_any_work(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(rooms, "LEAST_FREE", 1 << 62)
    with pytest.raises(OSError, match=r"out: .* are free in .*, and a shard may take"):
        demo.sweep_to(tmp_path / "run", [[5]], Tokens())


def test_a_damaged_shard_is_named(demo, tmp_path):
    run = demo.sweep_to(tmp_path / "run", random_prompts(3), Tokens())
    (path,) = shards(run.folder, SCORES)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path.name}: damaged"):
        demo.sweep_to(tmp_path / "run", random_prompts(3), Tokens())
    path.unlink()
    assert demo.sweep_to(tmp_path / "run", random_prompts(3), Tokens()).is_complete


def test_half_files_of_killed_processes_are_removed(demo, tmp_path):
    run = demo.sweep_to(tmp_path / "run", random_prompts(3), Tokens())
    left = [run.folder / SCORES / f".worker-{rank}-of-{world}-x.parquet.part" for rank, world in ((0, 1), (1, 2))]
    for path in left:
        path.write_bytes(b"half")
    assert len(run.to_pandas()) and run.n_done == 3
    demo.sweep_to(tmp_path / "run", random_prompts(3), Tokens())
    assert not any(path.exists() for path in left)


def test_every_prompt_has_one_owner_and_shares_are_even():
    ids = [str(i) for i in range(4000)]
    for world in (1, 2, 3, 8):
        owners = [[Share(rank, world).owns(id) for rank in range(world)] for id in ids]
        assert all(sum(one) == 1 for one in owners)
        sizes = np.array(owners).sum(0)
        assert sizes.min() > 0.85 * sizes.max()


def test_the_share_of_a_process_comes_from_its_environment():
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert Share.of_environment(torchrun) == Share(3, 8, 1, 2)
    srun = {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    }
    assert Share.of_environment(srun) == Share(3, 8, 1, 2)
    assert Share.of_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Share(), "a script without srun is alone"
    assert Share.of_environment({}) == Share()
    for wrong in ({**torchrun, "RANK": "8"}, {"WORLD_SIZE": "8"}, {**torchrun, "RANK": "x"}):
        with pytest.raises(ValueError, match="RANK"):
            Share.of_environment(wrong)


def test_the_processes_of_one_run_share_its_prompts(demo, tmp_path, monkeypatch):
    data = PromptSet.read(write_prompts(tmp_path / "x.jsonl", 30, bad=(4,)))
    whole = rows_of(demo.sweep_to(tmp_path / "whole", data, Tokens()).folder)
    for rank in range(3):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", str(rank))
        run = demo.sweep_to(tmp_path / "run", data, Tokens())
        assert run.is_complete == (rank == 2)
    rows = rows_of(tmp_path / "run")
    assert rows.keys() == whole.keys() and all(abs(rows[key] - whole[key]) < 1e-3 for key in rows)
    assert failed_of(tmp_path / "run") == ["p4"]


HOLD = """
import sys, time
from pathlib import Path
from depass_fast.sweep.folder import at_work
with at_work(Path(sys.argv[1]), 0, 2):
    print("held", flush=True)
    time.sleep(120)
"""


def test_two_processes_with_one_share_are_refused(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            with (
                pytest.raises(ValueError, match=r"another process \(rank 0 of 2\) is at work"),
                at_work(tmp_path, 0, 2),
            ):
                pass
            with pytest.raises(ValueError, match="another number than 1"), at_work(tmp_path, 0, 1):
                pass
            with at_work(tmp_path, 1, 2) as name:
                assert name == "worker-1-of-2"
        finally:
            process.kill()
    with at_work(tmp_path, 0, 1):
        pass


def test_other_libraries_read_the_folder(demo, tmp_path):
    demo.sweep_to(tmp_path / "run", random_prompts(5), Heads(layers="all"), shard_prompts=2, batch_size=2)
    folder = tmp_path / "run" / SCORES
    expected = Sweep.open(tmp_path / "run").to_pandas()
    assert len(pandas.read_parquet(folder)) == len(expected)
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(folder)
    assert frame.shape == expected.shape and frame["score"].sum() == pytest.approx(expected["score"].sum(), abs=1e-2)
    duckdb = pytest.importorskip("duckdb")
    (found,) = duckdb.sql(f"select count(*), count(distinct prompt) from '{folder}/*.parquet'").fetchall()
    assert found == (len(expected), 5)
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in shards(tmp_path / "run", SCORES)]
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == len(expected)
