"""``depass-fast sweep`` and ``collect``: flags, exit statuses, what is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from depass_fast import PromptSet, Sweep
from depass_fast.cli import sweep as command
from depass_fast.cli.main import main
from depass_fast.sweep.dealing import Share
from depass_fast.sweep.plot import title
from tests.support.sweeps import rows_of, write_prompts

pytest.importorskip("pyarrow")
pytest.importorskip("pandas")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def flags(tmp_path):
    """The flags of a sweep over ten prompts of which none is bad."""
    data = write_prompts(tmp_path / "x.jsonl", 10)
    return ["sweep", "--model", "demo", "--data", str(data), "--out", str(tmp_path / "run"), "--quiet"]


def test_a_sweep_and_its_collection(flags, tmp_path, capsys):
    assert main([*flags, "--components", "heads", "--layers", "all", "--allocation", "shapley"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"{tmp_path}/run: 10 of 10 prompts done" and f"collect {tmp_path}/run" in out
    assert main(["collect", str(tmp_path / "run"), "--top", "4", "--out", str(tmp_path / "means.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "heads of the demo model in the logits of 10 prompts of x.jsonl, shapley" and len(lines) == 2 + 4
    assert (tmp_path / "means.csv").read_text().count("\n") == 1 + 6 * 9
    assert main(["collect", str(tmp_path / "run"), "--top", "4", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == [line.split()[0] for line in lines[2:]]
    assert main(["collect", str(tmp_path / "run"), "--out", str(tmp_path / "means.parquet")]) == 0
    assert (tmp_path / "means.parquet").stat().st_size


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/SmolLM2", "SmolLM2"),
        ("/cache/models--openai--gpt2/snapshots/607a30d7", "gpt2"),
        (None, "LlamaForCausalLM"),
    ],
)
def test_a_run_is_titled_by_what_its_reader_knows(path, name):
    manifest = {
        "components": {"kind": "heads"},
        "data": {"name": "prompts", "prompts": 60},
        "options": {"allocation": "shapley"},
        "target_kind": "logit",
        "model": {"model": path, "model_class": "LlamaForCausalLM"},
    }
    assert title(manifest) == f"heads of {name} in the logits of 60 prompts, shapley"


def test_a_plot(flags, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([*flags, "--components", "heads", "--layer", "2,3"]) == 0
    for name in ("a.svg", "b.png"):
        assert main(["collect", str(tmp_path / "run"), "--plot", str(tmp_path / name)]) == 0
    from matplotlib import pyplot

    assert "L3H" in (tmp_path / "a.svg").read_text() and not pyplot.get_fignums(), "no figure is left open"
    run = Sweep.open(tmp_path / "run")
    ax = run.plot(top=5)
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([mean for _, mean in run.top(5)])
    assert "heads of the demo model in the logits of 10" in ax.get_title(loc="left").replace("\n", " ")
    with pytest.raises(ValueError, match="plot: there is no row of target 3"):
        run.plot(target=3)


def test_failures_are_an_exit_status(flags, tmp_path, capsys):
    write_prompts(tmp_path / "x.jsonl", 10, bad=(2,))
    assert main([*flags, "--components", "tokens", "--json"]) == 3
    said = json.loads(capsys.readouterr().out)
    assert (said["prompts"], said["done"], said["failed"], said["complete"]) == (10, 10, 1, True)
    assert main([*flags, "--components", "tokens"]) == 3, "a second start says it again"
    assert "the reasons are in" in capsys.readouterr().out
    flags[flags.index(str(tmp_path / "run"))] = str(tmp_path / "strict")
    assert main([*flags, "--components", "tokens", "--strict"]) == 2
    assert "prompt 'p2'" in capsys.readouterr().err


def test_a_line_per_shard_where_there_is_no_terminal(flags, capsys):
    flags.remove("--quiet")
    assert main([*flags, "--components", "tokens", "--shard-prompts", "4", "--batch-size", "4"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("shard")]
    assert len(lines) == 3 and lines[-1].startswith("shard 3: 2 prompts; 10 of 10 prompts, ")


def test_fields_targets_and_kinds(tmp_path, capsys):
    records = [{"text": "Nyria Morstam speaks", "answer": "Italian", "key": "a", "other": [5, " Italian"]}]
    (tmp_path / "x.jsonl").write_text(json.dumps(records[0]))
    start = ["sweep", "--model", "demo", "--data", str(tmp_path / "x.jsonl"), "--components", "tokens", "--quiet"]
    fields = ["--prompt-field", "text", "--target-field", "answer", "--id-field", "key", "--target-space"]
    assert main([*start, *fields, "--target-kind", "log-prob", "--out", str(tmp_path / "a")]) == 0
    frame = Sweep.open(tmp_path / "a").to_pandas()
    assert set(frame["target"]) == {"log P(' Italian'), P frozen"} and set(frame["prompt"]) == {"a"}
    assert main([*start, "--prompt-field", "text", "--target-field", "other", "--out", str(tmp_path / "b")]) == 0
    assert set(Sweep.open(tmp_path / "b").to_pandas()["target_number"]) == {0, 1}
    capsys.readouterr()
    assert main([*start, "--target-field", "answer", "--out", str(tmp_path / "c")]) == 2
    assert "x.jsonl, line 1: the field 'prompt' is missing; there are text, answer" in capsys.readouterr().err


WRONG = [
    (["--components", "heads"], "--layer: heads belong to a layer"),
    (["--components", "heads", "--layers", "0,9"], "--layer: 9 is out of range"),
    (["--components", "tokens", "--layers", "all"], "--layer: tokens enter at one layer"),
    (["--components", "tokens", "--target-kind", "log-prob", "--contrast-field", "x"], "--target-kind: the difference"),
    (["--components", "tokens", "--workers", "2"], "--workers: it belongs to --engine ray"),
    (["--components", "features"], "--dictionary: features need a file"),
    (["--components", "tokens", "--dictionary", "x.npz"], "--dictionary"),
    (["--components", "tokens", "--method", "adjoint"], "--method: 'adjoint' is for many"),
    (["--components", "tokens", "--split", "train"], "--split: 'train' belongs to a data set"),
    (["--components", "tokens", "--top", "0"], "--top: '0' is not a positive integer"),
    (["--components", "tokens", "--device", "cuda:7"], "--device: 'cuda:7' does not exist here"),
]


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_errors_name_the_flag(flags, capsys, more, message):
    assert main([*flags, *more]) == 2
    err = capsys.readouterr().err
    assert message in err and len([line for line in err.splitlines() if "error" in line]) == 1


def test_another_run_in_the_folder_is_refused(flags, capsys):
    assert main([*flags, "--components", "tokens"]) == 0
    assert main([*flags, "--components", "tokens", "--allocation", "half"]) == 2
    assert "--out: " in (err := capsys.readouterr().err) and "options.allocation is 'softmax'" in err


def test_no_folder_to_collect(tmp_path, capsys):
    assert main(["collect", str(tmp_path)]) == 2
    assert "holds no sweep" in capsys.readouterr().err


def test_two_processes_of_torchrun_share_the_prompts(tmp_path):
    data = write_prompts(tmp_path / "x.jsonl", 40, bad=(9,))
    flags = ["-m", "depass_fast", "sweep", "--model", "demo", "--data", str(data), "--components", "tokens"]
    started = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        environment = {**os.environ, **place, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *flags, "--out", str(tmp_path / "run")]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for rank, process in enumerate(started):
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0 and f"rank {rank}: shard 1: " in err, "a failed prompt ends no other process"
    run = Sweep.open(tmp_path / "run")
    assert run.is_complete and run.n_failed == 1 and len({key[0] for key in rows_of(run.folder)}) == 39


def test_more_processes_than_devices_are_refused(monkeypatch):
    import argparse

    threads = torch.get_num_threads()
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        assert command._device(argparse.Namespace(device=None), Share(0, 2, 0, 2)) == "cpu"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(ValueError, match="5 processes on a machine with 4 cores"):
        command._device(argparse.Namespace(device="cpu"), Share(0, 5, 0, 5))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="3 processes on a machine with 2 GPUs"):
        command._device(argparse.Namespace(device="cuda"), Share(2, 3, 2, 3))


def test_cells_that_hold_a_chat_are_one_whatever_the_column(tmp_path):
    chat = [{"role": "user", "content": "Hello"}]
    cell = json.dumps(chat).replace('"', '""')
    (tmp_path / "x.csv").write_text(f'conversation\n"{cell}"\n"[5, 6]"\n[no list\n')
    found = [one.prompt for one in PromptSet.read(tmp_path / "x.csv", prompt="conversation")]
    assert found == [chat, [5, 6], "[no list"]


def test_a_run_that_failed_is_collected_with_the_reason(flags, tmp_path, capsys):
    write_prompts(tmp_path / "x.jsonl", 10, bad=tuple(range(10)))
    assert main([*flags, "--components", "tokens"]) == 3
    assert "most often: prompt: id 1000000 is outside the vocabulary" in capsys.readouterr().out
    assert main(["collect", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert "10 of 10 prompts failed, most often: prompt: id 1000000" in said.err
