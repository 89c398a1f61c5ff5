"""``depass-fast collect``: the mean of every component over the prompts of a sweep. Heavy modules come inside."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from . import flags, types
from .output import emit, note, on_stderr
from .pictures import Pictures

if TYPE_CHECKING:
    import pandas

_DESCRIPTION = """\
Print the leading components of a sweep: the mean of their scores over the prompts, its standard error, and in how many
prompts they are among the leading ones. --out holds the row of every component.
"""
_EXAMPLES = """\
examples:
  depass-fast collect runs/heads
  depass-fast collect runs/heads --top 30 --out heads.csv --plot heads.svg
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description, the flags and the examples."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="that of `depass-fast sweep --out`")
    parser.add_argument("--top", type=types.positive, default=20, metavar="K", help="components shown. Default: 20")
    parser.add_argument(
        "--leading", type=types.positive, default=10, metavar="K", help="of a prompt, that are counted. Default: 10"
    )
    parser.add_argument(
        "--out", type=types.output_file(".csv", ".parquet"), metavar="FILE", help="write a row for every component"
    )
    parser.add_argument("--plot", type=types.picture, metavar="FILE", help="draw them")
    flags.add_json(parser, "a JSON object per component shown, each on a line")
    flags.add_debug(parser)


def run(args: argparse.Namespace) -> None:
    """Print the leading components, and write --out and --plot."""
    from ..sweep.opened import Sweep
    from ..sweep.plot import draw_means, table_of

    with on_stderr():
        pictures = Pictures(args.plot, numbered=False)
        sweep = Sweep.open(args.folder)
        frame = sweep.mean(args.leading)
        shown = sweep.leading(frame, args.top)
        if not sweep.is_complete:
            note(f"{sweep.n_done:,} of {sweep.n_prompts:,} prompts are done; the same sweep again does the rest.")
        if failed := sweep.n_failed:
            note(f"{failed:,} of {sweep.n_prompts:,} prompts failed, most often: {sweep.commonest_reason()}")
        if sweep.manifest["output"]["top"] is not None:
            note(
                f"the sweep kept {sweep.manifest['output']['top']} components of a result: a mean is of the n results "
                "that list the component."
            )
    if args.json:
        for one in json.loads(shown.to_json(orient="records") or "[]"):
            emit(json.dumps(one))
    else:
        emit(table_of(shown, sweep.manifest, args.leading))
    if args.out is not None:
        _write(frame, args.out)
        note(f"wrote {args.out}")
    pictures.add(lambda: draw_means(shown, sweep))


def _write(frame: pandas.DataFrame, path: Path) -> None:
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)
