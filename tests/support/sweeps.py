"""Data for sweeps of the demo model, and what must hold of a folder of one."""

from __future__ import annotations

import json
import random
from pathlib import Path

from pyarrow import parquet

from depass_fast.sweep.folder import ERRORS, SCORES, shards


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 5 to 40 tokens of the demo model."""
    drawn = random.Random(seed)
    return [[drawn.randrange(5, 2400) for _ in range(drawn.randint(5, 40))] for _ in range(count)]


def write_prompts(path: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    """A JSONL file of random prompts, named p0, p1, ...; those that are ``bad`` have an id that no model knows."""
    records = [
        {"id": f"p{i}", "input_ids": [10**6] if i in bad else ids} for i, ids in enumerate(random_prompts(count))
    ]
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def rows_of(folder: Path) -> dict[tuple, float]:
    """The scores of a run by prompt, position, target, layer and label. A row that is there twice is an error."""
    found: dict[tuple, float] = {}
    for path in shards(folder, SCORES):
        table = parquet.ParquetFile(path).read(["prompt", "position", "target_number", "layer", "label", "score"])
        for *key, score in zip(*(column.to_pylist() for column in table.columns), strict=True):
            assert tuple(key) not in found, f"{key} is there twice"
            found[tuple(key)] = score
    return found


def failed_of(folder: Path) -> list[str]:
    """The prompts that failed."""
    tables = [parquet.ParquetFile(path).read(["prompt"]) for path in shards(folder, ERRORS)]
    return [name for table in tables for name in table.column("prompt").to_pylist()]


def check_rows(rows: dict[tuple, float], expected: dict[tuple, float], whole: bool) -> None:
    """Check the scores of a run against those of one that was not cut short; ``whole``: none may be missing."""
    assert not rows.keys() - expected.keys()
    assert not whole or rows.keys() == expected.keys()
    prompts = {key[0] for key in rows}
    assert rows.keys() == {key for key in expected if key[0] in prompts}, "a prompt is there whole, or not at all"
    assert all(abs(score - expected[key]) <= 1e-3 for key, score in rows.items())
