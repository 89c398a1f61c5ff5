"""``depass-fast evaluate``: the paper's experiments and the checks that it left open, each by one command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..evaluate.catalog import ENTRIES, STUDIES, Entry, check_count
from . import flags, types
from .model import device_of, engine_of, silence_transformers
from .output import emit, note, on_stderr

_DESCRIPTION = """\
Run a study on a model: an experiment of the paper, or a check that it left open. The result is printed as tables, and
written to --out as JSON. A run that was cut short goes on when the same command is given again.
"""
_EXAMPLES = """\
examples:
  depass-fast evaluate tokens --model demo --quick
  depass-fast evaluate tokens --model ./llama --data known_1000.json --prompts 100 --out tokens.json --plot tokens.svg
"""


def add_arguments(parser: argparse.ArgumentParser, make: Any) -> None:
    """Add a subcommand for every study; ``make`` holds the arguments that all parsers take."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    names = ",".join(STUDIES)
    studies = parser.add_subparsers(title="studies", dest="study", required=True, metavar="{" + names + "}")
    for entry in ENTRIES:
        _add_study(studies.add_parser(entry.name, help=entry.help, description=f"Study: {entry.help}.", **make), entry)


def _add_study(parser: argparse.ArgumentParser, entry: Entry) -> None:
    what = parser.add_argument_group("model and data")
    flags.add_model(what)
    if entry.data is not None:
        what.add_argument(
            "--data",
            type=types.data_file,
            metavar="FILE",
            help=f"{entry.data}: a JSON list of objects, or one on every line. Default for the demo model: its own",
        )
    if entry.train is not None:
        what.add_argument(
            "--train", type=types.data_file, metavar="FILE", help=f"{entry.train}, which the classifier learns from"
        )
    what.add_argument("--name", metavar="NAME", help="the model's name in the result. Default: that of its folder")

    how = parser.add_argument_group("computation")
    how.add_argument(
        "--prompts", type=types.positive, metavar="N", help="prompts that are measured. Default: 100; 2 with --quick"
    )
    if entry.takes_layers:
        how.add_argument(
            "--layers", type=types.positions, metavar="L", help="layers, such as 0,3,7. Default: the study's own choice"
        )
    how.add_argument(
        "--seed", type=types.seed, default=0, metavar="N", help="the seed of all random draws, 0 to 10,000. Default: 0"
    )
    how.add_argument("--quick", action="store_true", help="the toy size: a few prompts, no intervals")
    flags.add_machine(how)

    out = parser.add_argument_group("output")
    out.add_argument(
        "--out",
        type=types.output_file(".json"),
        metavar="FILE.json",
        help="write the result; FILE.json.part holds what is done, and the run goes on from there",
    )
    out.add_argument("--plot", type=types.picture, metavar="FILE", help="draw the result's curves")
    flags.add_json(out)
    flags.add_quiet(out)
    flags.add_debug(out)
    # what the other commands have flags for
    parser.set_defaults(backend="auto", verify=False, chat=None, chat_template_kwargs=None)
    parser.set_defaults(allocation="softmax", temperature=0.1, no_exclude_special=False, value_activation="frozen")
    parser.set_defaults(run=run, check=check)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, before anything is imported."""
    entry = STUDIES[args.study]
    check_count(_prompts(args), args.quick)
    for name in ("data", "train"):
        if getattr(entry, name) is not None and getattr(args, name) is None and args.model != "demo":
            raise ValueError(f"--{name}: it is needed, a file with {getattr(entry, name)}.")


def _prompts(args: argparse.Namespace) -> int:
    return args.prompts or (2 if args.quick else 100)


def run(args: argparse.Namespace) -> None:
    """Run a study, and print or write what it finds."""
    import json

    with on_stderr():
        silence_transformers()
        result, study = _measured(args)
        if args.plot is not None:
            from ..evaluate.plot import draw

            draw(study.panels(result), args.plot)
            note(f"wrote {args.plot}")
    if args.json:
        emit(json.dumps(result))
    else:
        emit("\n\n".join(table.plain() for table in study.tables(result)))
    if args.out is not None:
        note(f"wrote {args.out}")


def _measured(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from ..evaluate.run import run as run_study
    from ..evaluate.study import Settings
    from ..plots import needs_matplotlib

    if args.plot is not None:
        needs_matplotlib()
    layers = getattr(args, "layers", None)
    settings = Settings(
        data=getattr(args, "data", None),
        train=getattr(args, "train", None),
        prompts=_prompts(args),
        layers=None if layers is None else tuple([layers] if isinstance(layers, int) else layers),
        seed=args.seed,
        quick=args.quick,
    )
    study = STUDIES[args.study].load()(engine_of(args, device_of(args.device)), settings)
    study.engine.options = study.engine.options.updated({"progress": False})
    report = (lambda line: None) if args.quiet else note
    name = args.name or Path(args.model).name
    return run_study(study, args.out, model=name, progress=not args.quiet, report=report), study
