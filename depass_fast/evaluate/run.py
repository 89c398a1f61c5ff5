"""A run of a study: resumable, with a progress bar, and its result as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine import DePass
from ..inputs.provenance import provenance_of
from ..runtime.dtypes import dtype_name
from ..runtime.progress import progress_bar
from ..trace.fingerprint import Fingerprint
from .catalog import FEWEST, check_count
from .study import Row, Settings, Study

FORMAT = 1


def run(
    study: Study,
    out: Path | None = None,
    *,
    model: str,
    progress: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Row:
    """Measure the items of a study and return the result, JSON values; write it to ``out``.

    ``out``.part gets a line per item. A run that was cut short goes on from there, and one that is asked for more
    prompts than ``out`` holds from that. ``model`` is the name in the result.

    Raises:
        ValueError: the model answers none of the prompts; they are too few for an interval; ``out`` or ``out``.part is
            of another run (the message says what differs).
        OSError: a file cannot be read or written.
    """
    settings = study.settings
    check_count(settings.prompts, settings.quick)
    part = None if out is None else out.with_name(out.name + ".part")
    head = _head(study, model)
    done = {} if out is None or part is None else _done(out, part, head, settings.prompts)
    rows, asked, began = [], 0, time.perf_counter()
    items = study.items()
    with progress_bar(study.title, settings.prompts, progress) as bar:
        for item in items:
            asked += 1
            if item is None:
                continue
            row = done.get(item.key)
            if row is None:
                started = time.perf_counter()
                row = {"key": item.key, **study.measure(item)}
                row["seconds"] = round(time.perf_counter() - started, 3)
                if part is not None:
                    _append(part, row)
                report(f"{len(rows) + 1} of {settings.prompts}: {row['seconds']:.1f} s")
            rows.append(row)
            if bar is not None:
                bar.finish()
            if len(rows) == settings.prompts:
                break
    _check_answers(settings, len(rows), asked)
    result = {
        **head,
        "environment": environment(study.engine),
        "asked": asked,
        "wanted": settings.prompts,
        "prompts": len(rows),
        "accuracy": len(rows) / asked,
        "seconds_per_prompt": sum(row["seconds"] for row in rows) / len(rows),
        "seconds": time.perf_counter() - began,
        **study.facts(),
        "summary": study.summary(rows),
        "rows": rows,
    }
    if out is not None and part is not None:
        write_result(out, result)
        part.unlink(missing_ok=True)
    return result


def write_result(path: Path, result: Row) -> None:
    """Write a result, an entry on a line and a row on a line. A file is there whole or not at all."""
    entries = [f' "{name}": {json.dumps(value)}' for name, value in result.items() if name != "rows"]
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    new = path.with_name(path.name + ".new")
    new.write_text("{\n" + ",\n".join([*entries, f' "rows": [\n{rows}\n ]']) + "\n}\n", encoding="utf-8")
    os.replace(new, path)


def environment(engine: DePass) -> Row:
    """Return the place of a run, beside the versions in its head: device, threads, Python, NumPy, date."""
    device = engine.adapter.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _check_answers(settings: Settings, found: int, asked: int) -> None:
    file = "the demo model's own prompts" if settings.data is None else str(settings.data)
    if not found:
        raise ValueError(f"data: the model answers none of the {asked} prompts of {file} (accuracy 0 %).")
    if found < FEWEST and not settings.quick:
        raise ValueError(
            f"data: the model answers {found} of the {asked} prompts of {file} (accuracy {found / asked:.0%}), too few "
            f"for a 95 % interval, which takes {FEWEST}; give more prompts, or ask for the toy size (--quick)."
        )


def _head(study: Study, model: str) -> Row:
    """Return what must be the same for a run to be gone on with."""
    settings, adapter, source = study.settings, study.engine.adapter, provenance_of(study.engine.adapter)
    return {
        "benchmark": "evaluate",
        "format": FORMAT,
        "study": study.name,
        "study_version": study.version,
        "model": {
            "name": model,
            "type": source.model_type,
            "layers": adapter.n_layers,
            "hidden_size": adapter.hidden_size,
            "dtype": dtype_name(adapter.dtype),
            "weights": Fingerprint.of(adapter.model).digest,
        },
        "versions": {name: getattr(source, name) for name in ("depass_fast", "torch", "transformers")},
        "data": _file(settings.data),
        "train": _file(settings.train),
        "layers": None if settings.layers is None else list(settings.layers),
        "seed": settings.seed,
        "quick": settings.quick,
        "options": {name: getattr(study.engine.options, name) for name in ("temperature", "exclude_special")},
        **study.depends_on(),
    }


def _file(path: Path | None) -> Row | None:
    return None if path is None else {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _done(out: Path, part: Path, head: Row, wanted: int) -> dict[str, Row]:
    """Return the rows of the same run, by their keys: one that was cut short, or one of fewer prompts."""
    before: Any
    if part.exists() and (text := part.read_text(encoding="utf-8")):
        lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]  # the last was cut short, too
        try:
            before, *rows = map(json.loads, lines)
            keys = [row["key"] for row in rows]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{part}: it is no run that was cut short; remove it, or give another --out.") from None
        _check_same(part, before, head)
    elif out.exists():
        try:
            before = json.loads(out.read_text(encoding="utf-8"))
            rows = before["rows"]
            keys = [row["key"] for row in rows]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{out}: it holds no result of a study; give another --out.") from None
        _check_same(out, before, head)
        if len(rows) > wanted:
            raise ValueError(f"{out}: it holds {len(rows)} prompts, {wanted} are asked for; give another --out.")
    else:
        rows, keys = [], []
    part.write_text("".join(f"{json.dumps(line)}\n" for line in [head, *rows]), encoding="utf-8")
    return dict(zip(keys, rows, strict=True))


def _check_same(path: Path, before: Any, head: Row) -> None:
    held = before if isinstance(before, dict) else {}
    differing = [name for name in head if held.get(name) != head[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path}: it holds another run, whose {name} is {held.get(name)!r}; here it is {head[name]!r}. Remove "
            "the file, or give another --out."
        )


def _append(part: Path, value: Any) -> None:
    with part.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
