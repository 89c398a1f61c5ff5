"""A sweep over a real local Ray of two workers, one of which is killed; needs the extra `ray`."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from depass_fast import DePass, Heads, PromptSet, Sweep, Tokens
from depass_fast.cli.main import main
from depass_fast.demo import load_demo
from depass_fast.sweep.over_ray import Pool, _resources, run_over_ray
from depass_fast.sweep.run import Writing
from tests.support.sweeps import check_rows, failed_of, rows_of, write_prompts

ray = pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]


def load() -> DePass:
    """The engine of a worker."""
    return DePass(*load_demo(), progress=False)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.fixture
def data(tmp_path) -> PromptSet:
    return PromptSet.read(write_prompts(tmp_path / "x.jsonl", 120, bad=(50,)))


def workers() -> list[int]:
    """The processes of the workers of a sweep."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"_Worker" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_worker_that_is_killed_loses_and_doubles_nothing(data, tmp_path):
    expected = rows_of(load().sweep_to(tmp_path / "whole", data, Tokens()).folder)
    killed, lines = [], []

    def kill() -> None:
        while len(lines) < 3:  # both have begun
            time.sleep(0.02)
        killed.extend(workers()[:1])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    writing = Writing(shard_prompts=5, most=1)
    counts = run_over_ray(load, data, tmp_path / "run", Tokens(), writing, Pool(workers=2, device="cpu"), lines.append)
    thread.join(10)
    run = Sweep.open(tmp_path / "run")
    assert killed and run.is_complete and (counts.finished, counts.failed) == (119, 1)
    check_rows(rows_of(run.folder), expected, whole=True)
    assert failed_of(run.folder) == ["p50"]


def test_a_second_start_does_the_rest(data, tmp_path):
    folder = tmp_path / "run"
    load().sweep_to(folder, data, Heads(layers="all"), shard_prompts=30, batch_size=30)
    for path in sorted((folder / "scores.parquet").glob("*.parquet"))[:2]:
        path.unlink()
    left = 120 - Sweep.open(folder).n_done
    lines = []
    run_over_ray(load, data, folder, Heads(layers="all"), Writing(shard_prompts=20), Pool(2), lines.append)
    assert Sweep.open(folder).is_complete and 0 < left < 120
    assert sum(int(re.search(r": (\d+) prompts;", line)[1]) for line in lines) == left
    assert not run_over_ray(load, data, folder, Heads(layers="all"), Writing(), Pool(2)).shards
    with pytest.raises(ValueError, match="another run, whose components.kind is 'heads'"):
        run_over_ray(load, data, folder, Tokens(), Writing(), Pool(2))


def test_errors_of_workers_are_raised_here(data, tmp_path):
    folder = tmp_path / "run"
    load().sweep_to(folder, data, Tokens(), batch_size=60, shard_prompts=60)
    next((folder / "scores.parquet").glob("*.parquet")).unlink()
    with pytest.raises(ValueError, match="another run, whose components.kind is 'tokens'"):
        run_over_ray(load, data, folder, Heads(1), Writing(), Pool(1))
    with pytest.raises(ValueError, match="prompt 'p50'"):
        run_over_ray(load, data, tmp_path / "strict", Tokens(), Writing(strict=True), Pool(1))


def test_more_workers_than_the_cluster_has(data, tmp_path):
    with pytest.raises(ValueError, match="workers: 4 take 4 cores, and the cluster has 2; take 2"):
        run_over_ray(load, data, tmp_path / "run", Tokens(), Writing(), Pool(workers=4))
    assert _resources({"CPU": 16.0, "GPU": 4.0}, Pool()) == (4, {"num_cpus": 4, "num_gpus": 1})
    with pytest.raises(ValueError, match="workers: 5 are asked for, and the cluster has 4 GPUs"):
        _resources({"CPU": 16.0, "GPU": 4.0}, Pool(workers=5))
    assert _resources({"CPU": 16.0, "GPU": 4.0}, Pool(2, 3, "cpu")) == (2, {"num_cpus": 3})


def test_the_command(data, tmp_path, capsys):
    flags = ["--model", "demo", "--data", str(tmp_path / "x.jsonl"), "--components", "heads", "--layers", "0,5"]
    assert (
        main(["sweep", *flags, "--out", str(tmp_path / "run"), "--engine", "ray", "--workers", "2", "--top", "3"]) == 3
    )
    assert "120 of 120 prompts done" in capsys.readouterr().out
