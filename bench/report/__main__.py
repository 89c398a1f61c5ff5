"""Write bench/RESULTS.md from result files: ``python -m bench.report bench/results/*.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..core.results import ROOT
from .page import report

RESULTS = ROOT / "bench" / "RESULTS.md"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that benchmarks wrote")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.out.write_text(report([json.loads(path.read_text()) for path in options.results]))


if __name__ == "__main__":
    main()
