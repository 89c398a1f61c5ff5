"""``depass-fast graph``: the leading nodes of a prompt, what they read from each other, and a file for viewers."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from . import flags, prompts, targets, types
from .model import device_of, engine_of, silence_transformers
from .output import emit, note, on_stderr
from .report import check_page, write_page

if TYPE_CHECKING:
    from ..graph.graph import Graph

_DESCRIPTION = """\
Find the tokens, heads and neurons that lead to a target, and the direct shares between them under a rule that is linear
in the components. A page draws them; a file is read by the viewers of circuit-tracer and Neuronpedia.
"""
_EXAMPLES = """\
examples:
  depass-fast graph --model demo --prompt "Nyria Morstam speaks" --html graph.html
  depass-fast graph --model ./llama --prompt "The capital of France is" --target " Paris" --target-kind log-prob
  depass-fast graph --model ./llama --prompt "The capital of France is" --nodes 500 --node-threshold 0.8 --out g.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description, the flags and the examples."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    what = parser.add_argument_group("what it is a graph of")
    flags.add_model(what)
    prompts.add_arguments(what, several=False)
    targets.add_arguments(what, several=False)

    how = parser.add_argument_group("how it is computed")
    flags.add_linear_rule(how)
    how.add_argument(
        "--nodes",
        type=types.positive,
        default=200,
        metavar="K",
        help="heads and neurons that are kept, beside all tokens. Default: 200",
    )
    how.add_argument(
        "--kinds",
        default="both",
        choices=("heads", "neurons", "both"),
        help="what may be a node; heads that are none are part of the edges. Default: both",
    )
    how.add_argument(
        "--node-threshold",
        type=types.fraction,
        default=1.0,
        metavar="P",
        help="leave out the nodes of the smallest influence, as circuit-tracer does: such as 0.8. Default: 1, none",
    )
    how.add_argument(
        "--edge-threshold", type=types.fraction, default=1.0, metavar="P", help="the same for edges: such as 0.98"
    )
    flags.add_machine(how)

    out = parser.add_argument_group("output")
    flags.add_json(out, "the file's content, on one line")
    out.add_argument(
        "--out", type=types.output_file(".json"), metavar="FILE", help="write FILE.json, which the viewers read"
    )
    out.add_argument("--html", type=types.output_file(".html"), metavar="FILE", help="write FILE.html, which draws it")
    out.add_argument("--slug", type=types.text, metavar="NAME", help="the graph's name in the file")
    out.add_argument("--scan", type=types.text, metavar="NAME", help="the model's name in the file")
    flags.add_quiet(out)
    flags.add_debug(out)
    # what the other commands have flags for
    parser.set_defaults(continuation=None, backend="auto", verify=False)
    parser.set_defaults(allocation="softmax", temperature=0.1, no_exclude_special=False, value_activation="frozen")


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, before anything is imported."""
    prompts.template_kwargs_of(args)
    targets.check(args, prompts.items_of(args))
    if isinstance(args.position, list):
        raise ValueError("--position: a graph is of one position.")
    if args.html is not None:
        check_page()


def run(args: argparse.Namespace) -> None:
    """Make a graph, print what leads, and write --out and --html."""
    with on_stderr():
        silence_transformers()
        engine = engine_of(args, device_of(args.device))
        (item,) = prompts.items_of(args)
        kinds = ("heads", "neurons") if args.kinds == "both" else (args.kinds,)
        what = targets.arguments(args, [item])
        graph: Graph = engine.graph(item.prompt, rule=args.rule, nodes=args.nodes, kinds=kinds, **what)
        if min(args.node_threshold, args.edge_threshold) < 1:
            graph = graph.prune(args.node_threshold, args.edge_threshold)
        if args.out is not None:
            graph.save(args.out, slug=args.slug, scan=args.scan)
            note(f"wrote {args.out}")
    if args.html is not None:
        write_page(args.html, lambda: graph.to_html(args.html))
    emit(json.dumps(graph.to_json(slug=args.slug, scan=args.scan), allow_nan=False) if args.json else graph)
