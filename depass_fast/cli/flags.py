"""The flags that `attribute` and `plan` share, and the method that some of them name together."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import types

if TYPE_CHECKING:
    from ..options import Adjoint, MethodName

_KINDS = ("tokens", "heads", "modules", "neurons")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_model(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--model", required=True, type=types.model, metavar="PATH", help="model folder, hub name, or demo"
    )


def add_components(group: argparse._ActionsContainer, layer: str) -> None:
    """--components and --layer. ``layer`` says what the default layer is."""
    group.add_argument("--components", required=True, choices=_KINDS)
    group.add_argument(
        "--layer",
        type=types.layer,
        metavar="L",
        help=f"counted from 0, -1 is the last; a hook's name; or all. Default: {layer}",
    )


def add_method(group: argparse._ActionsContainer) -> None:
    """--method and the numbers of the adjoint sweep."""
    group.add_argument(
        "--method", choices=("exact", "adjoint"), help="default: exact, but for many neurons of all layers"
    )
    group.add_argument("--refine", type=int, metavar="K", help="adjoint: propagate the K largest exactly. Default: 64")
    group.add_argument(
        "--refine-within", choices=("all", "layer"), help="adjoint: the K largest of all layers together, or of each"
    )
    group.add_argument("--sample", type=int, metavar="S", help="adjoint: estimate the error from S others. Default: 64")
    group.add_argument("--seed", type=int, metavar="N", help="adjoint: the seed of the random draws. Default: 0")


def add_machine(group: argparse._ActionsContainer) -> None:
    """--dtype, --device and --memory-budget."""
    group.add_argument("--dtype", choices=DTYPES, help="dtype of the model. Default: as stored")
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... Default: cuda if there is one, else cpu")
    group.add_argument(
        "--memory-budget",
        type=types.byte_count,
        metavar="BYTES",
        help="bytes of workspace, such as 2G. Default: what there is room for",
    )


def add_json(group: argparse._ActionsContainer) -> None:
    group.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")


def add_debug(group: argparse._ActionsContainer) -> None:
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def method_of(args: argparse.Namespace) -> MethodName | Adjoint | None:
    """Return the ``method`` that --method, --refine, --refine-within, --sample and --seed name together.

    --refine, --refine-within, --sample and --seed belong to the adjoint sweep: any of them asks for it.

    Raises:
        ValueError: one of them is given with another method, or is out of range.
    """
    given: dict[str, Any] = {
        "refine": args.refine,
        "within": args.refine_within,
        "sample": args.sample,
        "seed": args.seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if not given or args.method not in (None, "exact", "adjoint"):
        return args.method
    if args.method == "exact":
        flag = next(iter(given)).replace("within", "refine-within")
        raise ValueError(f"--{flag}: it belongs to --method adjoint; exact scores have nothing to be refined.")
    from ..options import Adjoint

    return Adjoint(**given)
