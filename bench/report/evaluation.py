"""Write docs/evaluation.md and its pictures: ``python -m bench.report.evaluation bench/results/evaluate/*.json``.

Results are those of ``depass-fast evaluate``. Texts are beside the results: ``introduction.md``, and ``STUDY.md``
with what a study does and what it found. Pictures need matplotlib: ``pip install -c constraints.txt -e ".[bench]"``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from depass_fast.evaluate.catalog import ENTRIES, STUDIES
from depass_fast.evaluate.plot import draw
from depass_fast.evaluate.tables import Table

from ..core.cli import command, writable
from ..core.results import ROOT

PAGE = ROOT / "docs" / "evaluation.md"
RESULTS = ROOT / "bench" / "results" / "evaluate"


def page(results: Sequence[tuple[str, dict]], texts: dict[str, str]) -> str:
    """Return the page in Markdown: ``results`` by the names of their files, ``texts`` by study."""
    parts = [texts.get("introduction", "# Evaluation").strip(), overview(results).markdown()]
    missing = [f"`{name}`" for name in STUDIES if name not in {result["study"] for _, result in results}]
    parts += [f"Not run on these models yet: {', '.join(missing)}."] if missing else []
    for entry in ENTRIES:
        found = [(name, result) for name, result in results if result["study"] == entry.name]
        if found:
            parts += section(entry.name, found, texts.get(entry.name, ""))
    return "\n\n".join(parts) + "\n"


def overview(results: Sequence[tuple[str, dict]]) -> Table:
    """Return what was run, where, and what it cost."""
    header = ["study", "model", "data", "prompts", "asked", "accuracy", "s per prompt", "threads", "file"]
    rows = [
        [
            f"[{result['study']}](#{anchor(result['study'])})",
            result["model"]["name"],
            _data(result),
            str(result["prompts"]),
            str(result["asked"]),
            f"{result['accuracy']:.0%}" if entry.load().answered_only else "-",
            f"{result['seconds_per_prompt']:.1f}",
            str(result["environment"]["threads"]),
            f"`{name}.json`",
        ]
        for entry in ENTRIES
        for name, result in results
        if result["study"] == entry.name
    ]
    return Table("What was run", header, rows, left=3, note="Seconds are those of machines that also did other work.")


def section(study: str, results: Sequence[tuple[str, dict]], text: str) -> list[str]:
    """Return a study's section: its text, and every result with its command, its tables and its picture."""
    loaded = STUDIES[study].load()
    parts = [f"## {loaded.title}", *([text.strip()] if text else [])]
    for name, result in results:
        parts += [f"### {result['model']['name']}, {_data(result)}", f"```bash\n{command_of(name, result)}\n```"]
        parts += [table.markdown() for table in loaded.tables(result)]
        if loaded.panels(result):
            parts.append(f"![{loaded.title}, {result['model']['name']}, {_data(result)}](evaluation/{name}.svg)")
    return parts


def command_of(name: str, result: dict) -> str:
    """Return the command that made a result."""
    model = result["model"]["name"]
    given = [f"--model {'demo' if model == 'demo' else 'FILE.gguf'}"]
    given += [f"--{flag} {result[flag]['file']}" for flag in ("data", "train") if result[flag] is not None]
    given += [] if model == "demo" else [f"--name {json.dumps(model) if ' ' in model else model}"]
    given += [] if result["layers"] is None else [f"--layers {','.join(map(str, result['layers']))}"]
    dtype = result["model"]["dtype"]
    given += [] if dtype == "float32" else [f"--dtype {dtype}"]
    given += [f"--prompts {result['wanted']}", *([f"--seed {result['seed']}"] if result["seed"] else [])]
    given += ["--quick"] if result["quick"] else []
    return f"depass-fast evaluate {result['study']} {' '.join(given)} --out {name}.json"


def anchor(study: str) -> str:
    """Return the anchor of a study's section."""
    kept = [c for c in STUDIES[study].load().title.lower() if c.isalnum() or c in " -_"]
    return "".join(kept).replace(" ", "-")


def _data(result: dict) -> str:
    return "its own prompts" if result["data"] is None else result["data"]["file"]


def read(paths: Sequence[Path]) -> tuple[list[tuple[str, dict]], dict[str, str]]:
    """Return results by the names of their files, and the texts beside them by study."""
    results = [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    folders = dict.fromkeys(path.parent for path in paths)
    texts = [path for folder in folders for path in folder.glob("*.md")]
    return results, {path.stem: path.read_text(encoding="utf-8") for path in texts}


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.report.evaluation", __doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that depass-fast evaluate wrote")
    parser.add_argument(
        "--out", type=writable, default=str(PAGE), help="the page; its pictures go to a folder beside it"
    )
    options = parser.parse_args(arguments)
    results, texts = read(options.results)
    options.out.write_text(page(results, texts), encoding="utf-8")
    folder = options.out.with_suffix("")
    folder.mkdir(exist_ok=True)
    for name, result in results:
        panels = STUDIES[result["study"]].load().panels(result)
        if panels:
            draw(panels, folder / f"{name}.svg")


if __name__ == "__main__":
    main()
