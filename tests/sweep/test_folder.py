"""`dp.sweep_to` and `Sweep`: what is in the folder, what is refused, what is done again."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from depass_fast import Adjoint, Custom, FailedPrompt, Heads, InputWarning, Neurons, PromptSet, Sweep, Tokens
from depass_fast.sweep import folder as rooms
from depass_fast.sweep.folder import DENSE, ERRORS, SCORES, prompts_of, shards
from depass_fast.sweep.outcomes import Outcome
from depass_fast.sweep.rows import COLUMNS, Rows
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
    left = [run.folder / ".parts" / f"worker-{rank}-of-{world}-x.parquet.part" for rank, world in ((0, 1), (1, 2))]
    for path in left:
        path.write_bytes(b"half")
    assert len(run.to_pandas()) and run.n_done == 3
    demo.sweep_to(tmp_path / "run", random_prompts(3), Tokens())
    assert not any(path.exists() for path in left)


def test_shards_without_a_manifest_are_refused(demo, tmp_path):
    run = demo.sweep_to(tmp_path / "run", random_prompts(3), Tokens())
    (run.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds files of a run, and no manifest.json"):
        demo.sweep_to(tmp_path / "run", random_prompts(3), Heads(1))


def test_a_prompt_in_two_shards_is_told(demo, tmp_path):
    run = demo.sweep_to(tmp_path / "run", random_prompts(3), Tokens())
    (path,) = shards(run.folder, SCORES)
    path.with_name("copy.parquet").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="two processes had the same share"):
        demo.sweep_to(tmp_path / "run", random_prompts(3), Tokens())


def test_failed_prompts_are_tried_again_where_it_is_asked_for(demo, tmp_path, monkeypatch):
    from depass_fast.sweep import outcomes

    compute = outcomes._results
    monkeypatch.setattr(outcomes, "_results", lambda asked, batch: (_ for _ in ()).throw(MemoryError("full")))
    run = demo.sweep_to(tmp_path / "run", random_prompts(5), Tokens())
    assert run.n_failed == 5 and run.commonest_reason() == "full"
    assert run.to_pandas().columns.tolist() == list(COLUMNS) and run.mean().empty and run.top(3) == []
    monkeypatch.setattr(outcomes, "_results", compute)
    with pytest.raises(ValueError, match="strict: 5 prompts failed in an earlier start"):
        demo.sweep_to(tmp_path / "run", random_prompts(5), Tokens(), strict=True)
    assert demo.sweep_to(tmp_path / "run", random_prompts(5), Tokens()).n_failed == 5
    assert demo.sweep_to(tmp_path / "run", random_prompts(5), Tokens(), retry_failed=True).n_failed == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="retry_failed: one process"):
        demo.sweep_to(tmp_path / "run", random_prompts(5), Tokens(), retry_failed=True)


def test_the_same_prompts_that_end_otherwise_replace_themselves(demo, tmp_path):
    """A unit of Ray's that is done twice: at first one of its prompts failed."""
    results = demo.attribute([5, 6, 7], Heads(1))
    fine, failed = Outcome("a", [results]), Outcome("b", [], FailedPrompt("b", "full", "MemoryError"))
    for last in (failed, Outcome("b", [results])):
        table = Rows()
        for one in (fine, last):
            if one.failure is None:
                table.add(one)
        rooms.write_shard(tmp_path, "x", [fine, last], table, None)
    assert prompts_of(tmp_path, SCORES) == {"a", "b"} and not shards(tmp_path, ERRORS)


def test_a_component_that_few_results_list_does_not_lead(demo, tmp_path):
    whole = demo.sweep_to(tmp_path / "all", random_prompts(30), Heads(layers="all"))
    few = demo.sweep_to(tmp_path / "few", random_prompts(30), Heads(layers="all"), top=2)
    assert [label for label, _ in few.top(2)] == [label for label, _ in whole.top(2)]
    assert (few.mean()["results"] == 30).all() and few.mean()["n"].min() < 30


def test_another_encoder_or_tokenizer_is_another_run(demo, tmp_path):
    import torch

    from depass_fast import DePass, Features, Subspaces
    from depass_fast.demo import load_demo

    class Dictionary:
        def __init__(self, scale):
            drawn = torch.Generator().manual_seed(0)
            self.W_enc, self.W_dec = (
                scale * torch.randn(128, 16, generator=drawn),
                torch.randn(16, 128, generator=drawn),
            )

        def encode(self, x):
            return torch.relu(x @ self.W_enc)

        def decode(self, features):
            return features @ self.W_dec

    demo.sweep_to(tmp_path / "sae", [[5, 6, 7]], Features(2, sae=Dictionary(1.0), site="resid_pre"))
    with pytest.raises(ValueError, match="the vectors or the dictionary are others"):
        demo.sweep_to(tmp_path / "sae", [[5, 6, 7]], Features(2, sae=Dictionary(2.0), site="resid_pre"))
    bases = [torch.eye(128)[:, :1], torch.eye(128)[:, 1:2]]
    demo.sweep_to(tmp_path / "bases", [[5, 6]], Subspaces(1, bases=bases, labels=["a", "b"]))
    with pytest.raises(ValueError, match="components.labels"):
        demo.sweep_to(tmp_path / "bases", [[5, 6]], Subspaces(1, bases=bases, labels=["b", "a"]))
    model, tokenizer = load_demo()
    DePass(model, tokenizer, progress=False).sweep_to(tmp_path / "text", ["Nyria"], Tokens())
    tokenizer.add_tokens(["Nyria"])
    with pytest.raises(ValueError, match="the tokenizer or its chat template is another"):
        DePass(model, tokenizer, progress=False).sweep_to(tmp_path / "text", ["Nyria"], Tokens())


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


@pytest.mark.parametrize(
    ("kind", "options", "is_told"),
    [
        (Tokens(), {}, True),
        (Tokens(), {"exclude_special": False}, False),
        (Tokens(), {"allocation": "shapley"}, False),
        (Heads(0), {}, False),
    ],
    ids=["default", "counted", "linear", "heads"],
)
def test_a_first_word_that_is_kept_apart_is_said_once_and_in_its_rows(demo, tmp_path, kind, options, is_told):
    prompts = [[demo.tokenizer.bos_token_id, 5, 6], [5, 6, 7], [6, 7, 8]]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", InputWarning)
        frame = demo.sweep_to(tmp_path, prompts, kind, **options).to_pandas()
    messages = [str(one.message) for one in said if one.category is InputWarning]
    assert len(messages) == is_told and all(
        one.startswith("prompt: it begins with no start token.") for one in messages
    )
    rows = frame.drop_duplicates("prompt").sort_values("prompt")["warnings"]
    assert list(rows.notna()) == [False, is_told, is_told] and set(rows.dropna()) == set(messages)
