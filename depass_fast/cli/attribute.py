"""``depass-fast attribute``: its flags and its work. Heavy modules are imported inside functions."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import flags, prompts, targets, types
from .model import components_of, config_of, device_of, engine_of, features_of, silence_transformers
from .output import Output, emit, note, on_stderr, saying_once, show
from .pictures import Pictures, add_plot
from .report import add_page, check_page, write_page

if TYPE_CHECKING:
    from ..components.base import ComponentKind
    from ..engine import DePass
    from .output import Result

_DESCRIPTION = "Print the share of every component in the logit of a target token."
_EXAMPLES = """\
examples:
  depass-fast attribute --model demo --prompt "Nyria Morstam speaks" --components tokens
  depass-fast attribute --model ./llama --prompt "The capital of France is" --components heads --layer 12 \\
      --target " Paris" --contrast " Rome"
  depass-fast attribute --model ./llama --input-ids "1 450 7483" --components neurons --layer 3 --out n3.safetensors
  depass-fast attribute --model ./llama --prompt "The capital of France is" --components neurons --layer all \\
      --method adjoint --refine 200 --sample 200
  depass-fast attribute --model ./llama --prompt "The capital of France is" --components tokens \\
      --continuation " Paris, of course" --reduce sum
  depass-fast attribute --model ./llama --prompt "The capital of France is" --components tokens --plot why.pdf
  depass-fast attribute --model ./llama --prompts prompts.jsonl --components tokens --out shares.jsonl
  depass-fast attribute --model ./llama --chat '[{"role": "user", "content": "Hello"}]' --components tokens
  depass-fast attribute --model ./gemma --prompt - --components features --dictionary params.npz \\
      --layer blocks.12.hook_resid_post < prompt.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description, the flags and the examples. --target and --contrast share an argument with their ids."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    what = parser.add_argument_group("what is attributed")
    flags.add_model(what)
    prompts.add_arguments(what, several=True)
    flags.add_components(what, "0 for tokens; none for others", (*flags.KINDS, "features"))
    flags.add_dictionary(what)
    targets.add_arguments(what)
    following = what.add_mutually_exclusive_group()
    following.add_argument(
        "--continuation",
        type=types.text,
        metavar="TEXT",
        help="a text that follows the prompt: the shares in each of its tokens, in the place of a target",
    )
    following.add_argument("--continuation-ids", dest="continuation", type=types.token_ids, metavar="IDS")
    what.add_argument(
        "--reduce", choices=("sum", "mean"), help="continuation: the shares in the sum or mean of the log-probabilities"
    )

    how = parser.add_argument_group("how it is computed")
    flags.add_method(how)
    flags.add_rule(how, "--rule")
    flags.add_value_activation(how)
    flags.add_backend(how)
    flags.add_machine(how)

    out = parser.add_argument_group("output")
    out.add_argument("--top", type=types.positive, metavar="K", help="print the K leading components. Default: 10")
    flags.add_json(out, "one JSON object per result, each on a line")
    out.add_argument(
        "--out",
        type=types.output_file(".safetensors", ".csv", ".jsonl"),
        metavar="FILE",
        help="write every score to FILE.safetensors, FILE.csv, or FILE.jsonl with a line per result; for several "
        "prompts or positions FILE-0.csv, FILE-1.csv, ...",
    )
    add_plot(out, "the result")
    add_page(out, "prompt, position and target")
    flags.add_quiet(out)
    flags.add_debug(out)


def run(args: argparse.Namespace) -> None:
    """Attribute, batch by batch; print the results and write --out as they come, and pictures and pages at the end."""
    numbered = prompts.is_several(args) or isinstance(args.position, list)
    with on_stderr():
        pictures = Pictures(args.plot, numbered)
        engine, components, options = _prepared(args)
        output = Output(args.out, numbered)
    items, shown = prompts.items_of(args), []
    for first in range(0, len(items), args.batch_size):
        batch = items[first : first + args.batch_size]
        with on_stderr():
            found = _attributions(engine, args, batch, components, options)
        shown += found if args.html is not None else []
        for number, results in enumerate(found, first + 1):
            for result in results:
                begins = prompts.is_several(args) and result is results[0]
                head = f"prompt {number} of {len(items)}\n" if begins else ""
                output.add(result, partial(_show, args, result, head if output.is_empty else f"\n{head}"))
                pictures.add(result.plot)
    output.close()
    if args.html is not None:
        write_page(args.html, lambda: _page(shown, args.html))


def _page(results: list[list[Result]], path: Path) -> None:
    from ..results.html import write_html

    write_html(results, path)


def _show(args: argparse.Namespace, result: Result, head: str) -> None:
    """Print a result; ``head`` goes before one that is text."""
    if head and not args.json:
        emit(head.removesuffix("\n"))
    show(result, as_json=args.json, top=args.top)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, before anything is imported."""
    flags.check_dictionary(args)
    prompts.template_kwargs_of(args)
    _check_targets(args)
    flags.check_method(args)
    if args.html is not None:
        check_page()


def _check_targets(args: argparse.Namespace) -> None:
    """Raise ValueError for targets, continuations and positions that do not go together."""
    items = prompts.items_of(args)
    targets.check(args, items)
    with_one = [args.continuation is not None or item.continuation is not None for item in items]
    if not any(with_one):
        if args.reduce is not None:
            raise ValueError(f"--reduce: {args.reduce} of the tokens of a continuation; give --continuation, too.")
        return
    if not all(with_one):
        raise ValueError("--prompts: either every line has a continuation, or none has one.")
    if args.top is not None and args.reduce is None:
        raise ValueError("--top: a continuation is printed token by token; give --reduce, too, or leave it out.")
    beside = [name for name in ("target", "contrast", "position") if getattr(args, name) is not None]
    if beside or any(item.target is not None for item in items):
        name = beside[0] if beside else "prompts"
        raise ValueError(f"--{name}: the tokens of a continuation are the targets; leave one of the two out.")


def _prepared(args: argparse.Namespace) -> tuple[DePass, ComponentKind, dict[str, Any]]:
    """The engine, the components and the arguments of a call. What needs no weights is checked before they load."""
    silence_transformers()
    import torch

    from ..backends import choose_backend
    from ..options import Options

    device = device_of(args.device)
    where, dtype = torch.device(device), getattr(torch, args.dtype) if args.dtype else None
    choose_backend(args.backend, where, dtype and Options().dtypes(dtype, where)[1])
    config = config_of(args.model)
    if args.components == "features":
        components, how = features_of(config, args.dictionary, args.layer, args.site, device)
        note(how)
    else:
        components = components_of(config, args.components, args.layer)
    method = flags.method_of(args)
    engine = engine_of(args, device)
    if prompts.is_several(args):
        prompts.check_all(args, engine)
    return engine, components, {"method": method}


def _attributions(
    engine: DePass,
    args: argparse.Namespace,
    batch: list[prompts.Item],
    components: ComponentKind,
    options: dict[str, Any],
) -> list[list[Result]]:
    """The results of each prompt of a batch: one, or one for each of several positions."""
    several = prompts.is_several(args)
    prompt = [item.prompt for item in batch] if several else batch[0].prompt
    with saying_once():
        found = engine.attribute(prompt, components, **_what(args, batch), **options)
    each = found if several else [found]
    return each if isinstance(args.position, list) else [[result] for result in each]


def _what(args: argparse.Namespace, batch: list[prompts.Item]) -> dict[str, Any]:
    """The arguments of `attribute` that say what is read."""
    given = [args.continuation if item.continuation is None else item.continuation for item in batch]
    if given[0] is not None:
        return {"continuation": given if prompts.is_several(args) else given[0], "reduce": args.reduce}
    return targets.arguments(args, batch)
