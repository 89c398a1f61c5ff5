"""``depass-fast report``: everything about one prompt, as a page to be looked at."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from . import flags, prompts, targets, types
from .model import device_of, engine_of, silence_transformers
from .output import emit, note, on_stderr

_DESCRIPTION = """\
Write everything about one prompt as one HTML file: the shares of tokens, of layers and positions, heads and neurons in
a target, and what each of these reads. Exact, under a rule that is linear in the components. Print what leads.
"""
_EXAMPLES = """\
examples:
  depass-fast report --model demo --prompt "Nyria Morstam speaks"
  depass-fast report --model ./llama --prompt "The capital of France is" --target " Paris" --out paris.html
  depass-fast report --model ./llama --prompt "The capital of France is" --target " Paris" --contrast " Rome"
  depass-fast report --model ./llama --prompt "The capital of France is" --graph
"""
_OUT = Path("report.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description, the flags and the examples."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    what = parser.add_argument_group("what is shown")
    flags.add_model(what)
    prompts.add_arguments(what, several=False)
    targets.add_arguments(what)

    what.add_argument(
        "--graph",
        type=types.positive,
        nargs="?",
        const=200,
        metavar="NODES",
        help="draw who reads from whom, too: a graph of 200 nodes, or as many as are given",
    )

    how = parser.add_argument_group("how it is computed")
    flags.add_linear_rule(how)
    flags.add_machine(how)

    out = parser.add_argument_group("output")
    out.add_argument(
        "--out",
        "--html",
        type=types.output_file(".html"),
        default=_OUT,
        metavar="FILE",
        help=f"the page. Default: {_OUT}",
    )
    flags.add_quiet(out)
    flags.add_debug(out)
    # what the other commands have flags for
    parser.set_defaults(continuation=None, backend="auto", verify=False)
    parser.set_defaults(allocation="softmax", temperature=0.1, no_exclude_special=False, value_activation="frozen")


def check(args: argparse.Namespace) -> None:
    """Raise an error for flags that do not go together, or a package that is missing, before anything is imported."""
    prompts.template_kwargs_of(args)
    targets.check(args, prompts.items_of(args))
    if args.graph is not None and isinstance(args.position, list):
        raise ValueError("--graph: a graph is of one --position.")
    check_page()


def run(args: argparse.Namespace) -> None:
    """Make the report, write its page, and print what leads."""
    (item,) = prompts.items_of(args)
    with on_stderr():
        silence_transformers()
        engine = engine_of(args, device_of(args.device))
        graph = False if args.graph is None else args.graph
        report = engine.report(item.prompt, rule=args.rule, graph=graph, **targets.arguments(args, [item]))
    write_page(args.out, lambda: report.to_html(args.out))
    emit(report)


def add_page(group: argparse._ActionsContainer, what: str) -> None:
    """Add --html; ``what`` has a sheet each."""
    group.add_argument(
        "--html",
        type=types.output_file(".html"),
        metavar="FILE",
        help=f"write a page to be looked at, with a sheet for every {what} (docs/report.md)",
    )


def check_page() -> None:
    """Raise ImportError where pages cannot be written."""
    from ..report.page import check_library

    check_library()


def write_page(path: Path, write: Callable[[], None]) -> None:
    """Write a page, and say so."""
    write()
    note(f"wrote {path}")
