"""Write bench/RESULTS.md from result files: ``python -m bench.report bench/results/*.json``."""

from __future__ import annotations

import json
from pathlib import Path

from ..core.cli import command, writable
from ..core.results import ROOT
from .gpu import write_goals
from .page import report

RESULTS = ROOT / "bench" / "RESULTS.md"


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.report", __doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that benchmarks wrote")
    parser.add_argument("--out", type=writable, default=str(RESULTS))
    parser.add_argument("--goals", action="store_true", help="make the table of goals in kernels/README.md, too")
    options = parser.parse_args(arguments)
    results = [json.loads(path.read_text()) for path in options.results]
    options.out.write_text(report(results))
    if options.goals:
        write_goals(results)


if __name__ == "__main__":
    main()
