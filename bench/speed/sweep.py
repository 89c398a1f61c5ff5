"""Sweeps over many prompts: against a plain loop, into files, over processes, and the memory of a long one.

Four parts, all on the demo model and random prompts of 5 to 40 tokens:

loop: `dp.sweep` beside a loop of `attribute`, in turns; both are verified to give the same scores.
files: `dp.sweep_to` beside `dp.sweep`, in turns: the price of Parquet and the manifest.
processes: two processes of one thread each, which share the prompts, beside one of one thread.
memory: resident memory of one process after 500 prompts and at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from depass_fast import ComponentKind, DePass, Heads, Tokens
from depass_fast.demo import load_demo

from ..core.cli import command, writable
from ..core.results import ROOT, environment, write_results
from ..core.timing import interleaved, quantiles

SHORTEST, LONGEST, EARLY = 5, 40, 500
TOLERANCE = 1e-4  # between the two ways, of the largest score
KINDS: dict[str, ComponentKind] = {
    "tokens": Tokens(),
    "heads of layer 0": Heads(0),
    "heads of all layers": Heads(layers="all"),
}
LOOP, SWEEP, FILES = "a loop of attribute", "dp.sweep", "dp.sweep_to"
PARTS = ("loop", "files", "processes", "memory")


@dataclass
class SweepRate:
    """Prompts per second of one way. ``ratio``: to the way that it is compared with. ``rss`` in bytes."""

    part: str
    workload: str
    provider: str
    prompts: int
    prompts_per_s: float | None
    ratio: float | None
    goal: str
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    runs: int = 1
    max_error: float | None = None
    rss: int | None = None
    environment: dict = field(default_factory=environment)

    def as_dict(self) -> dict:
        return asdict(self)


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random ids of the demo model; all lengths are equally likely."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator).tolist()
    return [torch.randint(5, 2400, (length,), generator=generator).tolist() for length in lengths]


def engine() -> DePass:
    return DePass(*load_demo(), progress=False)


def against_a_loop(name: str, prompts: list[list[int]], runs: int) -> Iterator[SweepRate]:
    """Time both ways in turns.

    Raises:
        RuntimeError: their scores differ; nothing is timed then.
    """
    dp, kind = engine(), KINDS[name]
    few = prompts[:64]
    pairs = zip((dp.attribute(prompt, kind) for prompt in few), dp.sweep(few, kind), strict=True)
    error = max(float((a.scores - b.scores).abs().max() / a.scores.abs().max()) for a, b in pairs)
    if not error <= TOLERANCE:
        raise RuntimeError(f"{name}: a sweep and a loop differ by {error:.1e}; nothing is timed.")

    def loop() -> None:
        for prompt in prompts:
            dp.attribute(prompt, kind)

    def sweep() -> None:
        for _ in dp.sweep(prompts, kind):
            pass

    yield from _compared("loop", name, {LOOP: loop, SWEEP: sweep}, len(prompts), runs, "≥ 2.5×", error)


def into_files(name: str, prompts: list[list[int]], runs: int) -> Iterator[SweepRate]:
    """Time a sweep without and with its files, in turns. A ratio of 0.97 is a price of 3 %."""
    dp, kind = engine(), KINDS[name]

    def sweep() -> None:
        for _ in dp.sweep(prompts, kind):
            pass

    def files() -> None:
        with tempfile.TemporaryDirectory() as folder:
            dp.sweep_to(Path(folder) / "run", prompts, kind)

    yield from _compared("files", name, {SWEEP: sweep, FILES: files}, len(prompts), runs, "≥ 0.97×")


def _compared(
    part: str,
    name: str,
    ways: dict[str, Callable[[], None]],
    count: int,
    runs: int,
    goal: str,
    error: float | None = None,
) -> Iterator[SweepRate]:
    """Yield the row of every way; the ratio is the median over the turns, to the first way in the same turn."""
    seconds = interleaved(ways, runs)
    first = next(iter(seconds.values()))
    for way, own in seconds.items():
        times = quantiles(own)
        ratio = None if own is first else float(quantiles(first / own)["median_s"])
        yield SweepRate(part, name, way, count, count / times["median_s"], ratio, goal, max_error=error, **times)


WORKER = """
import os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[4]))
from bench.speed.sweep import KINDS, engine, random_prompts
dp, prompts, folder = engine(), random_prompts(int(sys.argv[2])), Path(sys.argv[1])
dp.attribute(prompts[0], KINDS[sys.argv[3]])
(folder / f"ready{os.environ['RANK']}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
dp.sweep_to(folder / "run", prompts, KINDS[sys.argv[3]])
"""


def over_processes(name: str, count: int, runs: int) -> Iterator[SweepRate]:
    """Time one process and two, of one thread each, which load the model beforehand and begin together; in turns."""
    rates: dict[str, list[float]] = {"one process": [], "two processes": [], "one process of two threads": []}
    for _ in range(runs):
        for way, (world, threads) in zip(rates, ((1, 1), (2, 1), (1, 2)), strict=True):
            rates[way].append(count / _started(name, count, world, threads))
    one = rates["one process"]
    for way, own in rates.items():
        ratios = sorted(b / a for a, b in zip(one, own, strict=True))
        ratio = None if own is one else ratios[len(ratios) // 2]
        goal = "≥ 1.8×" if way == "two processes" else ""
        yield SweepRate("processes", name, way, count, sorted(own)[len(own) // 2], ratio, goal, runs=runs)


def _started(name: str, count: int, world: int, threads: int) -> float:
    """Return the seconds until the last of the processes has ended its sweep."""
    with tempfile.TemporaryDirectory() as place:
        folder, processes = Path(place), []
        for rank in range(world):
            own = {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": str(threads)}
            given = [sys.executable, "-c", WORKER, place, str(count), name, str(threads)]
            processes.append(subprocess.Popen(given, env={**os.environ, **own}, cwd=ROOT))
        while sum((folder / f"ready{rank}").exists() for rank in range(world)) < world:
            if any(process.poll() for process in processes):
                raise RuntimeError("a process of the sweep failed; its message is above.")
            time.sleep(0.01)
        began = time.perf_counter()
        (folder / "go").touch()
        if any(process.wait() for process in processes):
            raise RuntimeError("a process of the sweep failed; its message is above.")
        return time.perf_counter() - began


MEMORY = """
import json, sys
from pathlib import Path
import psutil
from bench.speed.sweep import EARLY, KINDS, engine, random_prompts
count, early, held = int(sys.argv[2]), int(sys.argv[4]), []
dp = engine()
def report(line):
    done = int(line.split("; ")[1].split(" of ")[0].replace(",", ""))
    held.append((done, psutil.Process().memory_info().rss))
dp.sweep_to(Path(sys.argv[1]) / "run", random_prompts(count), KINDS[sys.argv[3]], shard_prompts=early, report=report)
print(json.dumps([held[0], held[-1]]))
"""


def memory(name: str, count: int) -> Iterator[SweepRate]:
    """Read the resident memory of a process early and at the end."""
    with tempfile.TemporaryDirectory() as place:
        early = min(EARLY, count // 2)
        given = [sys.executable, "-c", MEMORY, place, str(count), name, str(early)]
        done = subprocess.run(given, cwd=ROOT, check=True, capture_output=True, text=True)
        (first, before), (last, after) = json.loads(done.stdout)
    for prompts, held, ratio in ((first, before, None), (last, after, after / before)):
        yield SweepRate("memory", name, f"after {prompts:,} prompts", prompts, None, ratio, "≤ 1.05×", rss=held)


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.sweep", __doc__)
    parser.add_argument("--out", type=writable, help="write the rows to this JSON file, after every part")
    parser.add_argument("--tiny", "--quick", action="store_true", help="a few prompts, one turn")
    parser.add_argument("--runs", type=int, help="turns (default: 5; 1 with --tiny)")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given again")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    runs, count, long = options.runs or (1 if options.tiny else 5), 20 if options.tiny else 1000, 10_000
    prompts, rows = random_prompts(count), []
    names = list(KINDS)[:1] if options.tiny else list(KINDS)
    parts: dict[str, Callable[[str], Iterator[SweepRate]]] = {
        "loop": lambda name: against_a_loop(name, prompts, runs),
        "files": lambda name: into_files(name, prompts, runs),
        "processes": lambda name: over_processes(name, count if options.tiny else 3 * count, runs),
        "memory": lambda name: memory(name, 40 if options.tiny else long),
    }
    for part in options.part or PARTS:
        for name in names if part in ("loop", "files") else names[:1]:
            for row in parts[part](name):
                rows.append(row)
                print(_line(row), flush=True)
            if options.out:
                write_results(options.out, "sweep", rows, device="cpu")


def _line(row: SweepRate) -> str:
    rate = f"{row.rss / 2**20:.0f} MiB" if row.rss else f"{row.prompts_per_s:.1f} prompts/s"
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}×" + (f" (goal {row.goal})" if row.goal else "")
    return f"{row.part:10} {row.workload:20} {row.provider:28} {rate:>18}  {ratio}"


if __name__ == "__main__":
    main()
