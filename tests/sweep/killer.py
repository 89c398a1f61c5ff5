"""Kill a sweep again and again, at random moments; after every kill look at what is there. Run by test_kills.py.

The processes are forks of this one, which has loaded the model: each starts in no time. This one imports pyarrow and
does not use it, nor any thread of torch's: forks could not use them any more.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from depass_fast import DePass, PromptSet, Tokens
from depass_fast.demo import load_demo
from depass_fast.sweep.folder import SCORES, shards
from tests.support.sweeps import check_rows, failed_of, rows_of, write_prompts

PROMPTS, BAD = 20, (7, 13)


def forked(work: Callable[[], None]) -> int:
    """Do something in a fork; returns its process number."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(process: int, what: str) -> None:
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit(f"{what} ended with {status}")


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    engine, data = DePass(*load_demo(), progress=False), write_prompts(folder / "x.jsonl", PROMPTS, BAD)
    drawn = random.Random(0)
    engine.attribute([5, 6, 7], Tokens())  # what is done once per model is done by now

    def sweep(out: Path) -> None:
        engine.sweep_to(out, PromptSet.read(data), Tokens(), shard_prompts=2, batch_size=2, dense=True)

    def look(out: Path, whole: bool) -> None:
        check_rows(rows_of(out), rows_of(folder / "whole"), whole)
        failed = failed_of(out)
        bad = sorted(f"p{i}" for i in BAD)
        assert sorted(failed) == bad if whole else set(failed) <= set(bad) and len(set(failed)) == len(failed)

    began = time.monotonic()
    ended(forked(lambda: sweep(folder / "whole")), "a sweep that is not killed")
    takes, killed, runs, found = time.monotonic() - began, 0, 0, set()
    while killed < kills:
        out = folder / f"run{runs}"
        runs += 1
        while True:
            process = forked(lambda out=out: sweep(out))
            time.sleep(drawn.random() * 0.9 * takes)
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            killed += os.WIFSIGNALED(status)
            found.add(len(shards(out, SCORES)))
            ended(forked(lambda out=out: look(out, whole=False)), f"a look after {killed} kills")
            if status == 0 or drawn.random() < 0.15:
                break
        ended(forked(lambda out=out: sweep(out)), "the sweep that does the rest")
        ended(forked(lambda out=out: look(out, whole=True)), "a look at the whole")
    print(f"{killed} kills in {runs} runs, with {sorted(found)} shards there; a run takes {takes:.2f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
