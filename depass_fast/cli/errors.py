"""Errors on the command line: which are the user's, and how one line tells them."""

from __future__ import annotations

import argparse

_OF_IDS = {"prompt": "input-ids", "target": "target-id", "contrast": "contrast-id"}
_RENAMED = {"within": "refine-within"}


def is_users(error: Exception) -> bool:
    """True if a user can mend it: bad input, a missing file or package, too little memory. All others are bugs."""
    if isinstance(error, (ValueError, TypeError, FloatingPointError, OSError, ImportError, MemoryError)):
        return True
    return type(error).__name__ in ("OutOfMemoryError", "SafetensorError")


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory; give a smaller --memory-budget, or a shorter prompt. {text}"
    return text or type(error).__name__


def in_flags(message: str, args: argparse.Namespace) -> str:
    """The message with the flag in place of the library's argument that it begins with."""
    name, colon, rest = message.partition(":")
    flag = _RENAMED.get(name, name.replace("_", "-"))
    field = flag.replace("-", "_")
    if not colon or field not in vars(args):
        return message
    if flag in _OF_IDS and not isinstance(getattr(args, field), str):
        flag = _OF_IDS[flag]
    return f"--{flag}:{rest}"
