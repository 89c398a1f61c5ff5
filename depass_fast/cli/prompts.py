"""The prompts of a call: their flags, the files that hold them, and their check before any is decomposed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import types

if TYPE_CHECKING:
    from ..engine import DePass

_FLAGS = {"prompt": "--prompt", "prompts": "--prompts", "chat": "--chat", "input_ids": "--input-ids"}


class Item(NamedTuple):
    """A prompt (text, ids or messages), and the target or the continuation that a line of --prompts may give it."""

    prompt: Any
    target: Any = None
    continuation: Any = None


class Chat(NamedTuple):
    """The messages of --chat, and the tools that may be beside them."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


def add_arguments(group: argparse._ActionsContainer, *, several: bool) -> None:
    """Add --prompt, --chat and --input-ids; with ``several`` also --prompts and --batch-size. One of them is needed."""
    ways = group.add_mutually_exclusive_group(required=True)
    again = "; give it again for more prompts" if several else ""
    ways.add_argument(
        "--prompt",
        type=types.text,
        action="append" if several else _Single,
        metavar="TEXT",
        help=f"a text; - reads it from standard input, without its last line break{again}",
    )
    if several:
        ways.add_argument(
            "--prompts",
            type=_file_of_prompts,
            metavar="FILE",
            help="several prompts: FILE.txt with a text per line; or FILE.jsonl with a JSON value per line, a text or "
            'an object with "prompt", "messages" or "input_ids", and a "target" or a "continuation" if you like',
        )
    ways.add_argument(
        "--chat",
        type=_chat,
        metavar="MESSAGES",
        help='a chat through the tokenizer\'s template: JSON such as [{"role": "user", "content": "Hello"}], or an '
        'object with "messages" and, if you like, "tools"; a file that holds it, or - for standard input',
    )
    ways.add_argument(
        "--input-ids",
        type=types.token_ids,
        metavar="IDS",
        help='token ids as they are, such as "1 5 9"; nothing is added',
    )
    add_template_kwargs(group)
    if several:
        group.add_argument(
            "--batch-size", type=types.positive, default=8, metavar="B", help="prompts computed together. Default: 8"
        )


def add_template_kwargs(group: argparse._ActionsContainer, dest: str = "chat_template_kwargs") -> None:
    """--chat-template-kwargs, stored as ``dest``."""
    group.add_argument(
        "--chat-template-kwargs",
        dest=dest,
        type=_template_kwargs,
        metavar="JSON",
        help='what else the chat template reads, an object such as {"enable_thinking": false}',
    )


class _Single(argparse.Action):
    """Stores a list of one, and refuses a second value."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given twice; one prompt is continued")
        setattr(namespace, self.dest, [values])


def items_of(args: argparse.Namespace) -> list[Item]:
    """Return the prompts of a call."""
    if getattr(args, "prompts", None) is not None:
        return args.prompts
    if args.prompt is not None:
        return [Item(text) for text in args.prompt]
    return [Item(args.chat.messages if args.chat is not None else args.input_ids)]


def template_kwargs_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return what chat templates read: --chat-template-kwargs, and the tools of --chat. None where there is neither.

    Raises:
        ValueError: no prompt is a chat, or both name tools.
    """
    given = args.chat_template_kwargs
    if given is not None and not any(_is_chat(item.prompt) for item in items_of(args)):
        raise ValueError("--chat-template-kwargs: it belongs to chats, --chat or lines of --prompts with messages.")
    tools = None if args.chat is None else args.chat.tools
    if tools is None:
        return given
    if "tools" in (given or {}):
        raise ValueError("--chat-template-kwargs: --chat has tools of its own; leave one of the two out.")
    return {"tools": tools} | (given or {})


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and isinstance(prompt[0], dict)


def flag_of(args: argparse.Namespace) -> str:
    """Return the flag that gave the prompts."""
    return next(flag for name, flag in _FLAGS.items() if getattr(args, name, None) is not None)


def is_several(args: argparse.Namespace) -> bool:
    """True if the call may have more than one prompt: --prompts, or --prompt more than once."""
    return args.prompts is not None or len(args.prompt or ()) > 1


def target_of(args: argparse.Namespace, item: Item) -> Any:
    """Return the target of a prompt: its line's or that of the flags, of the kind that --target-kind names."""
    target = args.target if item.target is None else item.target
    if args.target_kind == "logit":
        return target
    from ..inputs.targets import LogProb

    return LogProb(target)


def check_all(args: argparse.Namespace, engine: DePass) -> None:
    """Encode every prompt of several with its target or continuation, before the first one is decomposed.

    Raises:
        ValueError, TypeError: naming the prompt by its number, from 1.
    """
    import warnings

    for number, item in enumerate(items_of(args), 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is to be said is said when it is decomposed
                _check_one(item, args, engine)
        except (ValueError, TypeError) as error:
            raise type(error)(_numbered(str(error), number, args)) from error


def _check_one(item: Item, args: argparse.Namespace, engine: DePass) -> None:
    """Encode a prompt, and look up what is read of it."""
    from ..inputs.continuation import encode_continued
    from ..inputs.prompts import as_positions, encode
    from ..inputs.targets import parse_target

    adapter, tokenizer = engine.adapter, engine.tokenizer
    template_kwargs = engine.options.chat_template_kwargs
    ids = encode(item.prompt, adapter, tokenizer, template_kwargs)
    continuation = args.continuation if item.continuation is None else item.continuation
    if continuation is not None:
        encode_continued(item.prompt, continuation, adapter, tokenizer, template_kwargs)
        return
    parse_target(target_of(args, item), adapter, tokenizer, args.contrast)
    as_positions(-1 if args.position is None else args.position, len(ids))


def _numbered(message: str, number: int, args: argparse.Namespace) -> str:
    """The message with the flag that it is about, and with the prompt's number if it may depend on the prompt."""
    name, _, rest = message.partition(": ")
    if name in ("target", "contrast", "position", "continuation") and getattr(args, name) is not None:
        return message if name in ("target", "contrast") else f"{name}: prompt {number}: {rest}"
    return f"{flag_of(args)}: prompt {number}: {message.removeprefix('prompt: ')}"


# ------------------------------------------------------------------------------------------------ files


def _chat(given: str) -> Chat:
    """A chat: JSON, a file that holds it, or a dash for standard input."""
    text = given
    if given == "-":
        text = types.standard_input()
    elif not given.lstrip().startswith(("[", "{")):
        if not Path(given).expanduser().is_file():
            raise argparse.ArgumentTypeError(
                f'there is no file {given!r}; one turn is [{{"role": "user", "content": "Hello"}}].'
            )
        text = types.read_text(given)
    value = _json(text, "the messages")
    if not isinstance(value, dict) or "role" in value:
        return Chat(_messages(value, ""))
    unknown = [name for name in value if name not in ("messages", "tools")]
    if unknown:
        raise argparse.ArgumentTypeError(f'expected an object with "messages" and "tools"; it has {unknown[0]!r}, too')
    tools = value.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise argparse.ArgumentTypeError(f"tools: expected a list of tools, got {tools!r}")
    return Chat(_messages(value.get("messages"), "messages: "), tools)


def _template_kwargs(given: str) -> dict[str, Any]:
    """Arguments of a chat template: an object of JSON."""
    value = _json(given, "the arguments")
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected an object such as {{"enable_thinking": false}}, got {given}')
    return value


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        raise argparse.ArgumentTypeError(
            f'{where}expected a list of messages such as [{{"role": "user", "content": "Hello"}}]'
        )
    return value


def _is_message(value: Any) -> bool:
    """True for a role and what it says: a text, parts, or calls of tools."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), (str, list)) or isinstance(value.get("tool_calls"), list)


def _file_of_prompts(given: str) -> list[Item]:
    """The prompts of a file, a line each; empty lines are skipped."""
    path = Path(given).expanduser()
    if path.suffix not in (".txt", ".jsonl"):
        raise argparse.ArgumentTypeError(
            f"{given!r} must end in .txt (a text per line) or .jsonl (a JSON value per line)"
        )
    lines = enumerate(types.read_text(given).split("\n"), 1)  # nothing else ends a line of JSON
    found = list(
        _json_items(lines)
        if path.suffix == ".jsonl"
        else (Item(line.rstrip("\r")) for _, line in lines if line.strip())
    )
    if not found:
        raise argparse.ArgumentTypeError(f"{given!r} holds no prompts")
    return found


def _json_items(lines: Iterator[tuple[int, str]]) -> Iterator[Item]:
    for number, line in lines:
        if line.strip():
            where = f"line {number}: "
            value = _json(line, f"line {number}")
            yield Item(_checked_text(value, where)) if isinstance(value, str) else _item(value, where)


def _item(value: Any, where: str) -> Item:
    """The prompt that an object of a line describes."""
    known = ("prompt", "messages", "input_ids")
    given = [name for name in known if isinstance(value, dict) and name in value]
    allowed = (*known, "target", "continuation")
    unknown = [name for name in value if name not in allowed] if isinstance(value, dict) else []
    if len(given) != 1 or unknown:
        got = f"got {', '.join(map(repr, value)) or 'nothing'}" if isinstance(value, dict) else f"got {value!r}"
        raise argparse.ArgumentTypeError(
            f'{where}expected a text, or an object with one of "prompt", "messages" and "input_ids", and "target" or '
            f'"continuation" if you like; {got}'
        )
    target = _checked_target(value.get("target"), where)
    content, continuation = value[given[0]], value.get("continuation")
    if continuation is not None:
        check = _checked_text if isinstance(continuation, str) else _checked_ids
        continuation = check(continuation, f"{where}continuation: ")
    if given[0] == "messages":
        content = _messages(content, where)
    else:
        content = _checked_text(content, where) if given[0] == "prompt" else _checked_ids(content, where)
    return Item(content, target, continuation)


def _checked_text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise argparse.ArgumentTypeError(f"{where}expected a text that is not empty, got {value!r}")
    try:
        return types.token_text(value)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{where}{error}") from None


def _checked_target(value: Any, where: str) -> Any:
    """A target as JSON says it: null, an id, a text, or a pair of these in a list."""
    where = f"{where}target: "
    if value is None or type(value) is int:
        return value
    if isinstance(value, str):
        return _checked_text(value, where)
    if not isinstance(value, list) or len(value) != 2 or not all(type(item) in (int, str) for item in value):
        raise argparse.ArgumentTypeError(
            f'{where}expected a token id, a text of one token, or a pair of these such as [" Paris", " Rome"], got '
            f"{value!r}"
        )
    return tuple(_checked_text(item, where) if isinstance(item, str) else item for item in value)


def _checked_ids(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
        raise argparse.ArgumentTypeError(f"{where}expected a list of token ids such as [1, 5, 9], got {value!r}")
    return value


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{what}: not JSON ({error})") from None
