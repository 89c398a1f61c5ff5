"""Nothing is lost: processes that are killed at any moment, a disk that is full, a scheduler that ends the job."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from depass_fast import Sweep, Tokens
from tests.support.sweeps import random_prompts, rows_of, write_prompts

pytest.importorskip("pyarrow")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def python(*arguments: object, **more) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, cwd=ROOT, **more)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_kills_at_random_moments_lose_nothing_and_double_nothing(tmp_path, pytestconfig):
    wanted = 50 if pytestconfig.getoption("thorough") else 10
    done = python("-m", "tests.sweep.killer", tmp_path, wanted)
    assert done.returncode == 0, done.stderr[-3000:]
    kills, there = re.fullmatch(r"(\d+) kills in \d+ runs, with (.+) shards there.*", done.stdout.strip()).groups()
    assert int(kills) >= wanted and len(there.split(",")) >= 4, done.stdout


FULL = """
import sys
from pathlib import Path
from depass_fast import DePass, Heads
from depass_fast.demo import load_demo
from depass_fast.sweep import folder
from tests.support.sweeps import random_prompts
folder.LEAST_FREE = 1
engine = DePass(*load_demo(), progress=False)
try:
    engine.sweep_to(sys.argv[1], random_prompts(60), Heads(layers="all"), shard_prompts=10, batch_size=10)
except OSError as error:
    sys.exit(f"errno {error.errno}")
"""


def test_a_full_disk_keeps_what_was_finished(tmp_path):
    """On a file system of 40 KiB of memory, where this machine lets a user mount one."""
    small, code = tmp_path / "small", tmp_path / "full.py"
    small.mkdir()
    code.write_text(FULL)
    own = ["unshare", "-Urm", "sh", "-c"]
    try:
        can = subprocess.run([*own, f"mount -t tmpfs -o size=40k tmpfs {small}"], capture_output=True).returncode == 0
    except FileNotFoundError:
        can = False
    if not can:
        pytest.skip("no file system can be mounted here")
    run = f"{sys.executable} {code} {small}/run"
    script = f"mount -t tmpfs -o size=40k tmpfs {small}; {run}; echo $?; cp -r {small}/run {tmp_path}/before; "
    script += f"mount -o remount,size=4m {small}; {run}; echo $?; cp -r {small}/run {tmp_path}/after"
    done = subprocess.run([*own, script], capture_output=True, text=True, env=ENVIRONMENT, timeout=300, cwd=ROOT)
    assert done.stdout.split() == ["1", "0"], done.stderr[-3000:]
    assert f"errno {errno.ENOSPC}" in done.stderr
    before, after = Sweep.open(tmp_path / "before"), Sweep.open(tmp_path / "after")
    assert 0 < before.n_done < 60 == after.n_done
    assert not list((tmp_path / "before").rglob("*.part")), "half a file frees its place"
    assert rows_of(before.folder).items() <= rows_of(after.folder).items()


def test_a_shard_that_cannot_be_written_is_told_and_the_others_stay(demo, tmp_path, monkeypatch):
    from pyarrow import parquet

    write, count = parquet.write_table, []

    def full(table, path, **options):
        write(table, path, **options)
        count.append(path)
        if len(count) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        demo.sweep_to(tmp_path / "run", random_prompts(20), Tokens(), shard_prompts=5, batch_size=5)
    assert not list((tmp_path / "run").rglob("*.part")) and Sweep.open(tmp_path / "run").n_done in (10, 15)
    assert demo.sweep_to(tmp_path / "run", random_prompts(20), Tokens()).is_complete
    rows_of(tmp_path / "run")


def _heed_signals() -> None:
    """Undo that a shell lets its jobs in the background ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_asked_to_stop_writes_what_it_has(tmp_path, sent):
    data = write_prompts(tmp_path / "x.jsonl", 3000)
    command = [sys.executable, "-m", "depass_fast", "sweep", "--model", "demo", "--components", "tokens"]
    command += ["--data", data, "--out", tmp_path / "run", "--batch-size", "2", "--shard-prompts", "10"]
    started = {"stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT, "cwd": ROOT}
    with subprocess.Popen(command, preexec_fn=_heed_signals, **started) as process:
        try:
            while not list((tmp_path / "run" / "scores.parquet").glob("*.parquet")):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.02)
            process.send_signal(sent)
            assert process.wait(60) == 130
        finally:
            process.kill()
    run = Sweep.open(tmp_path / "run")
    assert 0 < run.n_done < 3000 and not list(tmp_path.rglob("*.part"))
    rows_of(run.folder)


def test_a_signal_in_the_midst_of_a_prompt_leaves_it_whole(demo, tmp_path, monkeypatch):
    """Ctrl-C between the rows of a prompt's two positions, and again while the shard is written."""
    from depass_fast.sweep import rows, run

    add, write, count = rows.Rows._add, run.write_shard, []

    def interrupted(self, outcome, result):
        count.append(result.position)
        if len(count) == 6:
            signal.raise_signal(signal.SIGINT)
        add(self, outcome, result)

    def slow(*given):
        signal.raise_signal(signal.SIGINT)
        return write(*given)

    monkeypatch.setattr(rows.Rows, "_add", interrupted)
    monkeypatch.setattr(run, "write_shard", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            demo.sweep_to(tmp_path / "run", random_prompts(8), Tokens(), positions=[[2, 4]] * 8, batch_size=8)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    frame = Sweep.open(tmp_path / "run").to_pandas()
    assert frame["prompt"].nunique() == 3, "what was added before the signal"
    assert (frame.groupby("prompt", observed=True)["position"].nunique() == 2).all()
