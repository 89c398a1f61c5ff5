"""Several processes: who owns which prompt, and who may be at work in a folder."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from depass_fast import PromptSet, Tokens
from depass_fast.sweep.dealing import Share
from depass_fast.sweep.folder import at_work
from tests.support.sweeps import failed_of, random_prompts, rows_of, write_prompts

pytest.importorskip("pandas")


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


def test_a_file_system_without_locks_is_doubted(demo, tmp_path, monkeypatch):
    import fcntl

    def no_locks(handle, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(RuntimeWarning, match="has no locks"):
        demo.sweep_to(tmp_path / "run", random_prompts(3), Tokens())
