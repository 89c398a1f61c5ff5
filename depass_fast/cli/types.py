"""What the flags of the command line take."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..options import Adjoint


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def layer(text: str) -> int | str:
    """A number, or a name such as blocks.5.attn.hook_z."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 500000000, 512M or 2G")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def lengths(text: str) -> list[int]:
    """One number of tokens, or several."""
    items = text.replace(",", " ").split()
    if not items or not all(item.isdecimal() and int(item) > 0 for item in items):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, nor a list of such")
    return [int(item) for item in items]


def method_of(args: argparse.Namespace) -> str | Adjoint | None:
    """Return the ``method`` that --method, --refine, --refine-within, --sample and --seed name together.

    A number of the sweep alone asks for the sweep.

    Raises:
        ValueError: such a number with --method exact, or one out of range.
    """
    given = {"refine": args.refine, "sample": args.sample, "within": getattr(args, "refine_within", None)}
    given |= {"seed": getattr(args, "seed", None)}
    given = {name: value for name, value in given.items() if value is not None}
    if args.method not in (None, "adjoint") or not given:
        for name in ("refine", "sample", "within"):
            if name in given and args.method == "exact":
                flag = "refine-within" if name == "within" else name
                raise ValueError(f"--{flag}: it belongs to --method adjoint; exact scores have nothing to be refined.")
        return args.method
    from ..options import Adjoint

    return Adjoint(**given)
