"""Errors on the command line: which are the user's, and how one line tells them."""

from __future__ import annotations

import argparse
import re

_OF_IDS = {"target": "target-id", "contrast": "contrast-id", "continuation": "continuation-ids"}
_OF_LINES = ("target", "continuation")  # a line of --prompts may give them
_PROMPTS = {"prompt": "prompt", "prompts": "prompts", "chat": "chat", "input_ids": "input-ids"}
_RENAMED = {"within": "refine-within", "sae": "dictionary", "path": "model"}
_USERS = (ValueError, TypeError, FloatingPointError, OSError, ImportError, MemoryError)
# of libraries that may not be there; a TemplateError is a chat's that its template refuses
_USERS_BY_NAME = {"OutOfMemoryError", "SafetensorError", "TemplateError"}


_ADVICE = (  # the library's own, as it is given in Python
    (r"\bmethod='(\w+)'", r"--method \1"),
    (r"\b(?:method=)?Adjoint\(refine=(\d+), within='(\w+)'\)", r"--refine \1 --refine-within \2"),
    (r"\b(?:method=)?Adjoint\(refine=(\d+), sample=(\d+)\)", r"--refine \1 --sample \2"),
    (r"\bbackend='(\w+)'", r"--backend \1"),
    (r"\bverify=True\b", "--verify"),
    (r"\bmemory_budget=(\d+)", r"--memory-budget \1"),
    (r"\bchat_template_kwargs\b", "--chat-template-kwargs"),
    (r"\battribute\(\.\.\., continuation=\.\.\.\)", "`depass-fast attribute --continuation`"),
    (r"\bcontinuation=(?!\w)", "--continuation"),
)


def with_flags(text: str) -> str:
    """The text of a warning or an error with flags where it advises arguments of the library."""
    for argument, flag in _ADVICE:
        text = re.sub(argument, flag, text)
    return text


def is_users(error: Exception) -> bool:
    """True if a user can mend it: bad input, a missing file or package, too little memory. All others are bugs."""
    return isinstance(error, _USERS) or any(kind.__name__ in _USERS_BY_NAME for kind in type(error).__mro__)


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory; give a smaller --memory-budget, or a shorter prompt. {text}"
    if any(kind.__name__ == "TemplateError" for kind in type(error).__mro__):
        return f"prompt: the tokenizer's chat template refuses it: {text}"
    return text or type(error).__name__


def in_flags(message: str, args: argparse.Namespace) -> str:
    """The message with the flag in place of the library's argument that it begins with."""
    name, colon, rest = message.partition(":")
    if colon and name == "prompt":
        given = [flag for field, flag in _PROMPTS.items() if getattr(args, field, None) is not None]
        return f"--{given[0]}:{rest}" if given else message
    flag = _RENAMED.get(name, name.replace("_", "-"))
    field = flag.replace("-", "_")
    if not colon or field not in vars(args):
        return message
    if field in _OF_LINES and getattr(args, field) is None and getattr(args, "prompts", None) is not None:
        return f"--prompts: {message}"
    if flag in _OF_IDS and not isinstance(getattr(args, field), str):
        flag = _OF_IDS[flag]
    return f"--{flag}:{rest}"
