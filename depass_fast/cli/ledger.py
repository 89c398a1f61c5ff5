"""``depass-fast ledger``: the leading tokens, modules, heads and neurons of all layers, from one backward pass."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import flags, prompts, targets, types
from .model import device_of, engine_of, silence_transformers
from .output import Output, Writer, emit, on_stderr, print_view
from .pictures import Pictures, add_plot
from .report import add_page, check_page, write_page

if TYPE_CHECKING:
    from ..ledger.book import Ledger
    from ..ledger.view import View

KINDS = ("tokens", "modules", "heads", "neurons")  # in the order in which they are printed

_DESCRIPTION = """\
Print the leading tokens, modules, heads and neurons of all layers, exactly, under a rule that is linear in the
components: one forward and one backward pass for all of them.
"""
_EXAMPLES = """\
examples:
  depass-fast ledger --model demo --prompt "Nyria Morstam speaks"
  depass-fast ledger --model ./llama --prompt "The capital of France is" --target " Paris" --target-kind log-prob
  depass-fast ledger --model ./llama --prompt "The capital of France is" --kinds heads,neurons --top 20 --out heads.csv
  depass-fast ledger --model ./llama --prompts prompts.jsonl --rule half --out book.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description, the flags and the examples."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    what = parser.add_argument_group("what is attributed")
    flags.add_model(what)
    prompts.add_arguments(what, several=True)
    targets.add_arguments(what)
    what.add_argument(
        "--kinds",
        type=_kinds,
        metavar="KINDS",
        help="those that are printed and written, such as heads,neurons. Default: tokens,modules,heads,neurons, less "
        "what no layer of the model has",
    )

    how = parser.add_argument_group("how it is computed")
    flags.add_linear_rule(how, "--allocation", type=_rule, metavar="{" + ",".join(flags.LINEAR_RULES) + "}")
    how.add_argument(
        "--attention",
        action="store_true",
        help="print the second book, too: what the target owes to where heads look (`depass-fast attention --credit`)",
    )
    flags.add_machine(how)

    out = parser.add_argument_group("output")
    out.add_argument(
        "--top", type=types.positive, default=5, metavar="K", help="print the K leading ones of every kind. Default: 5"
    )
    flags.add_json(out, "one JSON object per prompt and position, each on a line")
    out.add_argument(
        "--out",
        type=types.output_file(".safetensors", ".csv", ".jsonl"),
        metavar="FILE",
        help="write the ledger to FILE.safetensors, which answers more questions in Python (load_ledger), one file per "
        "batch; or the scores of --kinds to FILE.csv or FILE.jsonl, as `depass-fast attribute` does",
    )
    add_plot(out, "the kinds of --kinds")
    add_page(out, "prompt, position and target")
    flags.add_quiet(out)
    flags.add_debug(out)
    # what the other commands have flags for
    parser.set_defaults(continuation=None, backend="auto", verify=False)
    parser.set_defaults(allocation="softmax", temperature=0.1, no_exclude_special=False, value_activation="frozen")


def _rule(given: str) -> str:
    """A linear rule; of the others the error says what they have instead of a ledger."""
    if given in flags.LINEAR_RULES:
        return given
    known = ", ".join(flags.LINEAR_RULES)
    if given == "softmax":
        raise argparse.ArgumentTypeError(
            f"'softmax' is not linear and has no ledger; take one of {known}, or for the neurons of all layers "
            "`depass-fast attribute --components neurons --layer all --method adjoint`"
        )
    raise argparse.ArgumentTypeError(f"{given!r} is not one of the linear rules {known}, which have a ledger")


def _kinds(given: str) -> tuple[str, ...]:
    """Kinds of components, separated by commas."""
    kinds = tuple(item.strip() for item in given.split(","))
    for kind in kinds:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"{kind!r} is not one of {', '.join(KINDS)}")
    return tuple(dict.fromkeys(kinds))


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, before anything is imported."""
    prompts.template_kwargs_of(args)
    items = prompts.items_of(args)
    targets.check(args, items)
    if any(item.continuation is not None for item in items):
        raise ValueError("--prompts: a ledger has targets; lines with a continuation are for `depass-fast attribute`.")
    if args.html is not None:
        check_page()


def run(args: argparse.Namespace) -> None:
    """Make a ledger per batch; print what leads in every prompt and position, and write --out as they come."""
    numbered = prompts.is_several(args) or isinstance(args.position, list)
    with on_stderr():
        pictures = Pictures(args.plot, numbered)
        silence_transformers()
        engine = engine_of(args, device_of(args.device))
        if prompts.is_several(args):
            prompts.check_all(args, engine)
    items, whole = prompts.items_of(args), args.out is not None and args.out.suffix == ".safetensors"
    books = Writer(args.out if whole else None, numbered=len(items) > args.batch_size)
    output, sheets = Output(None if whole else args.out, numbered), []
    for first in range(0, len(items), args.batch_size):
        batch = items[first : first + args.batch_size]
        with on_stderr():
            prompt = [item.prompt for item in batch] if prompts.is_several(args) else batch[0].prompt
            book = engine.ledger(prompt, rule=args.rule, attention=args.attention, **targets.arguments(args, batch))
            books.write(book)
            sheets += book.page_sheets() if args.html is not None else []
        for number, read in product(range(len(batch)), range(book.n_reads)):
            with on_stderr():
                page = _Page.of(book, args, number, read)
            begins = prompts.is_several(args) and read == 0
            head = f"prompt {first + number + 1} of {len(items)}" if begins else ""
            output.add(page, partial(page.show, head if output.is_empty else f"\n{head}"))
            pictures.add(partial(_drawn, book, args.kinds or book.kinds, number, read))
    output.close()
    if args.html is not None:
        write_page(args.html, partial(_write, sheets, args.html))


def _write(sheets: list[Any], path: Path) -> None:
    from ..report.page import write_page as write_sheets

    write_sheets(sheets, path)


def _drawn(book: Ledger, kinds: tuple[str, ...], prompt: int, read: int) -> Any:
    """The picture of one prompt at one position."""
    from ..ledger.drawn import draw_page

    return draw_page(book, kinds, prompt, read)


@dataclass(frozen=True)
class _Page:
    """One prompt at one position of a ledger: as plain values where they are printed or written, or as a view."""

    values: dict[str, Any]
    views: tuple[View, ...]

    @staticmethod
    def of(book: Ledger, args: argparse.Namespace, prompt: int, read: int) -> _Page:
        """Read off the kinds that --kinds names."""
        which: dict[str, Any] = {"kinds": args.kinds, "prompt": prompt, "read": read}
        written = args.out is not None and args.out.suffix != ".safetensors"
        values = book.to_dict(**which) if args.json or written else {}
        if args.attention and values:
            values["steered"] = book.steered.to_dict(**which)
        if args.json:
            return _Page(values, ())
        views = [one.view(args.top, **which) for one in ((book, book.steered) if args.attention else (book,))]
        # without the line on other prompts: they follow
        return _Page(values, tuple(replace(view, about=view.about[-1:]) for view in views))

    def show(self, head: str) -> None:
        """Print it; ``head`` goes before a view."""
        if not self.views:
            emit(json.dumps(self.values, allow_nan=False))
            return
        if head:
            emit(head.removesuffix("\n"))
        for number, view in enumerate(self.views):
            if number:
                emit("")
            print_view(view)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values."""
        return self.values

    def to_csv(self, path: Path) -> None:
        """Write a table with a row per component: its kind, the layer where it starts, its label and its score.

        With a second book, `steered` is a column more.
        """
        from ..results.tables import write_csv

        books = [self.values, *([self.values["steered"]] if "steered" in self.values else [])]
        columns = [list(_rows_of(book)) for book in books]
        names = ["kind", "layer", "label", "score", "steered"][: 3 + len(books)]
        if len(books) == 1:
            write_csv(path, names, columns[0])
            return
        steered = {row[:3]: row[3] for row in columns[1]}  # `bias` may be there in one book only
        carried = {row[:3]: row[3] for row in columns[0]}
        keys = dict.fromkeys([*carried, *steered])
        write_csv(path, names, ((*key, carried.get(key, 0.0), steered.get(key, 0.0)) for key in keys))


def _rows_of(book: dict[str, Any]) -> Iterator[tuple[str, int, str, float]]:
    """Yield the kind, layer, label and score of every component of a book."""
    for kind in KINDS:
        found = book.get(kind)
        for one in [] if found is None else found.get("layers", [found]):
            for label, score in zip(one["labels"], one["scores"], strict=True):
                yield kind, one["layer"], label, score
