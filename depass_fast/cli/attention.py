"""``depass-fast attention``: why heads look where they look, and what a target owes to that."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from . import flags, prompts, targets, types
from .model import check_layer, components_of, config_of, device_of, engine_of, silence_transformers
from .output import Output, emit, on_stderr, print_view, saying_once
from .report import add_page, check_page, write_page

if TYPE_CHECKING:
    from ..results.credit import AttentionCredit
    from ..results.explanation import AttentionExplanation

_DESCRIPTION = """\
Print the shares of components in the attention logits of one query: why a head looked where it looked. With --credit,
how much of a target's logit is owed to where heads look, for every component and every head.
"""
_EXAMPLES = """\
examples:
  depass-fast attention --model demo --prompt "Nyria Morstam speaks" --layer 1 --head 0
  depass-fast attention --model ./llama --prompt "When Mary and John went to the store, John gave a drink to" \\
      --layer 9 --head 6 --query -1 --key 1,9 --components heads --start 5
  depass-fast attention --model ./llama --prompt "The capital of France is" --credit --target " Paris" --out credit.csv
"""
_OF_CREDIT = ("target", "contrast", "position")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description, the flags and the examples."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    what = parser.add_argument_group("what is explained")
    flags.add_model(what)
    prompts.add_arguments(what, several=False)
    what.add_argument("--layer", type=types.layer, metavar="L", help="the layer of the attention, -1 is the last")
    what.add_argument("--head", type=types.positions, metavar="H", help="a head, or several: 3,6. Default: all")
    what.add_argument("--query", type=int, metavar="Q", help="the position that looks. Default: -1")
    what.add_argument(
        "--key", type=types.positions, metavar="K", help="a position, or two: why 3 and not 8 is 3,8. Default: all"
    )
    what.add_argument("--components", default="tokens", choices=flags.KINDS, help="Default: tokens")
    what.add_argument(
        "--start", type=types.layer, metavar="L", help="the layer where they start. Default: 0 for tokens"
    )
    what.add_argument("--credit", action="store_true", help="the credit in a target, of all heads from --start on")
    targets.add_arguments(what, several=False)

    how = parser.add_argument_group("how it is computed")
    how.add_argument(
        "--rule",
        default=None,
        choices=flags.LINEAR_RULES,
        help="credit: the linear rule of the way from heads to the target. Default: --allocation if it is linear, else "
        "shapley",
    )
    flags.add_rule(how)
    how.set_defaults(allocation=None, value_activation="frozen")  # it is for models without recurrences
    flags.add_backend(how)
    flags.add_machine(how)

    out = parser.add_argument_group("output")
    out.add_argument("--top", type=types.positive, metavar="K", help="print K components. Default: 5; credit: 10")
    out.add_argument(
        "--pairs", type=types.positive, metavar="K", help="print the K leading pairs of the leading key, too"
    )
    flags.add_json(out)
    flags.add_out(out)
    add_page(out, "head, or for every target of a credit")
    flags.add_quiet(out)
    flags.add_debug(out)
    parser.set_defaults(continuation=None)  # which other commands have a flag for


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, before anything is imported."""
    prompts.template_kwargs_of(args)
    targets.check(args, prompts.items_of(args))
    if args.html is not None:
        check_page()
    if args.credit:
        beside = [name for name in ("layer", "head", "query", "key", "pairs") if getattr(args, name) is not None]
        if beside:
            raise ValueError(f"--{beside[0]}: --credit is of all heads; leave one of the two out.")
        if isinstance(args.position, list):
            raise ValueError("--position: the credit is of one position.")
        return
    given = [name for name in (*_OF_CREDIT, "rule") if getattr(args, name) is not None]
    if given:
        raise ValueError(f"--{given[0]}: it belongs to --credit.")
    if args.layer is None:
        raise ValueError("--layer: say whose attention is to be explained; or give --credit for all of it.")
    if args.layer == "all":
        raise ValueError("--layer: one layer at a time; --credit is of all.")
    if isinstance(args.key, list) and len(args.key) != 2:
        raise ValueError("--key: one position, or two (why one and not the other).")


def run(args: argparse.Namespace) -> None:
    """Explain, print, and write --out."""
    with on_stderr():
        silence_transformers()
        components = _components(args)
        rule: dict[str, Any] = {} if args.allocation is None else {"allocation": args.allocation}
        args.allocation = args.allocation or "softmax"
        engine = engine_of(args, device_of(args.device))
        output = Output(args.out, numbered=False)
        (item,) = prompts.items_of(args)
        with saying_once():
            if args.credit:
                what = targets.arguments(args, [item])
                found = engine.attention_credit(item.prompt, components, rule=args.rule, **rule, **what)
            else:
                key = tuple(args.key) if isinstance(args.key, list) else args.key
                place: dict[str, Any] = {"query": -1 if args.query is None else args.query, "key": key}
                found = engine.explain_attention(item.prompt, components, args.layer, args.head, **place)
    output.add(found, lambda: _show(args, found))
    output.close()
    if args.html is not None:
        write_page(args.html, lambda: found.to_html(args.html))


def _components(args: argparse.Namespace) -> Any:
    """Return the components; they and the layer are checked before any weight is read."""
    config = config_of(args.model)
    if isinstance(args.layer, int):
        check_layer(args.layer, getattr(config.get_text_config(), "num_hidden_layers", None))
    try:
        if args.start == "all":
            raise ValueError("--layer: components start at one layer; `depass-fast ledger --attention` has all.")
        return components_of(config, args.components, args.start)
    except ValueError as error:
        raise ValueError(str(error).replace("--layer:", "--start:", 1)) from None


def _show(args: argparse.Namespace, found: AttentionExplanation | AttentionCredit) -> None:
    """Print a result: one line of JSON, or text, which is in colour on a terminal."""
    from ..results.attention_view import View, plain, plain_credit

    if args.json:
        pairs = {} if args.pairs is None else {"pairs": _leading(found, args.pairs)}
        emit(json.dumps(found.to_dict() | pairs, allow_nan=False))
    elif args.credit:
        emit(plain_credit(found, args.top or 10))  # pyright: ignore[reportArgumentType]
    else:
        why: Any = found
        columns = args.top or 5
        print_view(View(why, components=columns), lambda: plain(why, components=columns))
        if args.pairs is not None:
            emit(_pairs(why, args.pairs))


def _pairs(why: AttentionExplanation, k: int) -> str:
    """Return the leading pairs of every head's most probable key."""
    from ..results.render import plain_table, rows_of_pairs

    lines = []
    for of_head in _leading(why, k):
        found = [(f"{query} · {key}", score) for query, key, score in of_head["pairs"]]
        lines += ["", f"head {of_head['head']}, key {of_head['key']}: leading pairs, query · key"]
        lines += plain_table(rows_of_pairs(found))
    return "\n".join(lines)


def _leading(why: Any, k: int) -> list[dict[str, Any]]:
    """Return the leading pairs of every head's most probable key."""
    found = []
    for number, head in enumerate(why.heads):
        p = why.probabilities if why.one_head else why.probabilities[number]
        key = why.keys[int(p.argmax())]
        found.append({"head": head, "key": key, "pairs": [list(pair) for pair in why.pairs(key, k, head)]})
    return found
