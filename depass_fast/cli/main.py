"""The command ``depass-fast`` and its subcommands. Heavy modules are imported inside these."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any, NoReturn

from ..runtime.terminal import escaping_output
from . import attention, attribute, collect, evaluate, flags, generate, graph, ledger, plan, report, sweep, types
from .errors import in_flags, is_users, one_line, with_flags
from .model import silence_transformers
from .output import drop_output, emit, note
from .startup import import_transformers

_DESCRIPTION = """\
Exact attributions for Hugging Face causal language models: how much of a logit comes from every input token,
attention head, module or MLP neuron. The shares sum to the logit.
"""
_NEGATIVE = re.compile(r"-\d+(,-?\d+)*,?$|-\d*\.\d+$")  # a value of a flag, not a flag
_EXAMPLES = """\
examples:
  depass-fast demo
  depass-fast attribute --model demo --prompt "Nyria Morstam speaks" --components tokens
  depass-fast doctor
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 after an error of the user's, 130 after Ctrl-C.

    A sweep some of whose prompts failed ends with 3.

    Without ``argv`` this is the command of the process, whose imports may be lighter than a library's.
    """
    with escaping_output():
        return _main(argv)


def _main(argv: list[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except ValueError as error:
        return _fail(str(error))
    except KeyboardInterrupt:  # while standard input is read
        return 130
    try:
        if "check" in args:
            args.check(args)
        if argv is None and args.command != "doctor":
            import_transformers()
        code = args.run(args)
        print(end="", flush=True)  # nothing, where the shell closed standard output
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone (`| head`)
        drop_output()
        return 0
    except Exception as error:
        if getattr(args, "debug", False) or not is_users(error):
            raise
        return _fail(with_flags(in_flags(one_line(error), args)))
    return code or 0


def _fail(message: str) -> int:
    note(f"depass-fast: error: {message}")
    return 2


# ------------------------------------------------------------------------------------------------ arguments


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors, so that they are printed on one line like all others; -1,3 is a value to it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = _NEGATIVE

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    def __call__(self, *_: Any) -> NoReturn:
        from .. import __version__

        emit(f"depass-fast {__version__}")
        raise SystemExit(0)


def _parser() -> argparse.ArgumentParser:
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser("depass-fast", description=_DESCRIPTION, epilog=_EXAMPLES, **shape)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(
        title="commands",
        dest="command",
        required=True,
        metavar="{demo,attribute,ledger,report,attention,graph,generate,sweep,collect,plan,evaluate,doctor}",
    )

    demo = commands.add_parser(
        "demo",
        help="a tour on the small model that comes along; no arguments, a few seconds",
        description="Attribute the answers of the small language model that comes with the library.",
        epilog="example:\n  depass-fast demo",
        **shape,
    )
    demo.add_argument(
        "--svg", type=types.output_file(".svg"), metavar="FILE", help="write the output as a picture, too"
    )
    demo.set_defaults(run=_demo)

    shares = commands.add_parser(
        "attribute", help="the share of every token, head, module, neuron or feature in a logit", **shape
    )
    attribute.add_arguments(shares)
    shares.set_defaults(run=attribute.run, check=attribute.check)

    book = commands.add_parser(
        "ledger", help="the leading tokens, modules, heads and neurons of all layers, from one backward pass", **shape
    )
    ledger.add_arguments(book)
    book.set_defaults(run=ledger.run, check=ledger.check)

    seen = commands.add_parser("report", help="everything about one prompt, as a page to be looked at", **shape)
    report.add_arguments(seen)
    seen.set_defaults(run=report.run, check=report.check)

    looks = commands.add_parser(
        "attention", help="why heads look where they look, and what a logit owes to that", **shape
    )
    attention.add_arguments(looks)
    looks.set_defaults(run=attention.run, check=attention.check)

    nodes = commands.add_parser(
        "graph", help="the nodes that lead to a logit, and the direct shares between them, for graph viewers", **shape
    )
    graph.add_arguments(nodes)
    nodes.set_defaults(run=graph.run, check=graph.check)

    texts = commands.add_parser(
        "generate", help="continue a prompt, with the tokens that each new one drew on", **shape
    )
    generate.add_arguments(texts)
    texts.set_defaults(run=generate.run, check=generate.check)

    into = "attribute a file of prompts into a folder, or go on where that was stopped"
    many = commands.add_parser("sweep", help=into, **shape)
    sweep.add_arguments(many)
    many.set_defaults(run=sweep.run, check=sweep.check)

    means = commands.add_parser("collect", help="the mean of every component over the prompts of a sweep", **shape)
    collect.add_arguments(means)
    means.set_defaults(run=collect.run)

    costs = commands.add_parser("plan", help="FLOP, memory and time of a decomposition, before it is run", **shape)
    plan.add_arguments(costs)
    costs.set_defaults(run=plan.run, check=flags.check_method)

    studies = commands.add_parser("evaluate", help="the paper's experiments and more, on your model", **shape)
    evaluate.add_arguments(studies, shape)

    doctor = commands.add_parser(
        "doctor",
        help="versions, devices, and which backends can run here and why not",
        description="Report versions, devices, and which backends can run here and why not.",
        epilog="example:\n  depass-fast doctor --json",
        **shape,
    )
    flags.add_json(doctor)
    doctor.set_defaults(run=_doctor)
    return parser


# ------------------------------------------------------------------------------------------------ doctor, demo


def _doctor(args: argparse.Namespace) -> None:
    from . import doctor

    found = doctor.report()
    emit(json.dumps(found, indent=2) if args.json else "\n".join(doctor.lines(found)))


def _demo(args: argparse.Namespace) -> None:
    silence_transformers()
    import torch
    from rich.console import Console

    from .tour import tour

    console = Console(record=args.svg is not None, width=100 if args.svg is not None else None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small is slower on several threads, above all on a busy machine
    try:
        tour(console)
    finally:
        torch.set_num_threads(threads)
    if args.svg is not None:
        console.save_svg(str(args.svg), title="depass-fast demo")
        note(f"wrote {args.svg}")
