"""The target of a call: its flags, their check, and the arguments of the library that they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from . import prompts, types


def add_arguments(group: argparse._ActionsContainer, several: bool = True) -> None:
    """Add --target, --contrast, --target-kind and --position. A target shares its argument with its id.

    ``several`` tells whether the command reads several positions; who does not refuses a list of them.
    """
    target = group.add_mutually_exclusive_group()
    target.add_argument(
        "--target", type=types.token_text, metavar="TEXT", help="one token. Default: the model's own next token"
    )
    target.add_argument("--target-id", dest="target", type=int, metavar="I")
    group.add_argument(
        "--target-kind",
        choices=("logit", "log-prob"),
        default="logit",
        help="attribute the target's logit, or its log-probability, with P frozen: for ranking neurons and heads. "
        "Default: logit",
    )
    contrast = group.add_mutually_exclusive_group()
    contrast.add_argument(
        "--contrast", type=types.token_text, metavar="TEXT", help="one token: attribute logit(target) - logit(contrast)"
    )
    contrast.add_argument("--contrast-id", dest="contrast", type=int, metavar="I")
    group.add_argument(
        "--position",
        type=types.positions,
        metavar="P",
        help="where the logit is read"
        + ("; or several, such as 3,8,-1, in one decomposition. Default: -1" if several else ". Default: -1"),
    )


def check(args: argparse.Namespace, items: Sequence[prompts.Item]) -> None:
    """Raise ValueError for flags that do not go together, or with what the lines of --prompts give."""
    for name in ("target", "continuation"):
        if getattr(args, name) is not None and any(getattr(item, name) is not None for item in items):
            raise ValueError(f"--{name}: the lines of --prompts have a {name} of their own; leave one of the two out.")
    if args.target_kind == "log-prob":
        _check_log_prob(args, items)


def arguments(args: argparse.Namespace, batch: Sequence[prompts.Item]) -> dict[str, Any]:
    """Return the arguments of `attribute` and `ledger` that say what is read of a batch of prompts."""
    read = {"contrast": args.contrast, "position": -1 if args.position is None else args.position}
    if any(item.target is not None for item in batch):
        return read | {"targets": [prompts.target_of(args, item) for item in batch]}
    return read | {"target": prompts.target_of(args, batch[0])}


def _check_log_prob(args: argparse.Namespace, items: Sequence[prompts.Item]) -> None:
    """Raise ValueError for --target-kind log-prob beside what is no single token."""
    if args.contrast is not None:
        raise ValueError(
            "--target-kind: the difference of two log-probabilities is that of the logits; leave it or --contrast out."
        )
    if args.continuation is not None or any(item.continuation is not None for item in items):
        raise ValueError("--target-kind: a continuation has the shares in logits and log-probabilities; leave it out.")
    if any(isinstance(item.target, tuple) for item in items):
        raise ValueError("--target-kind: log-prob is of one token, and a line of --prompts has a pair as its target.")
