"""The types of the command line's flags: each parses and checks what one flag is given."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path


def text(given: str) -> str:
    """A text that is not empty; a dash stands for standard input."""
    if given == "-":
        given = standard_input()
    return token_text(given)


def token_text(given: str) -> str:
    """A text that is not empty, as it is."""
    if not given:
        raise argparse.ArgumentTypeError("empty; at least one token is needed")
    try:
        given.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{given!r} is no valid UTF-8") from None
    return given


def standard_input() -> str:
    """Standard input up to its end, without its last line break."""
    try:
        content = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"standard input is no text ({error})") from None
    return content.removesuffix("\n").removesuffix("\r")


def read_text(given: str) -> str:
    """The text of a file in UTF-8."""
    try:
        return Path(given).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{given!r} cannot be read ({error})") from None


def token_ids(given: str) -> list[int]:
    """Token ids, separated by spaces or commas."""
    items = given.replace(",", " ").split()
    for item in items:
        if not item.isdecimal() or int(item) >= 2**63:
            raise argparse.ArgumentTypeError(f'{item!r} is not a token id; expected integers such as "1 5 9"')
    if not items:
        raise argparse.ArgumentTypeError('empty; expected integers such as "1 5 9"')
    return [int(item) for item in items]


def lengths(given: str) -> list[int]:
    """One number of tokens, or several."""
    items = given.replace(",", " ").split()
    if not items or not all(item.isdecimal() and int(item) > 0 for item in items):
        raise argparse.ArgumentTypeError(f"{given!r} is not a number of tokens, nor a list of such numbers")
    return [int(item) for item in items]


def model(given: str) -> str:
    """A folder with a config.json, a GGUF file, the name of a model on the hub, or "demo"."""
    path = Path(given).expanduser()
    is_gguf = path.suffix.lower() == ".gguf"
    if given == "demo" or (path.is_dir() and (path / "config.json").is_file()) or (path.is_file() and is_gguf):
        return given
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() == ".gguf")
        hint = f"; of the GGUF files in it give one, such as {path / files[0]}" if files else ""
        raise argparse.ArgumentTypeError(f"{given!r} is no model folder: it holds no config.json{hint}")
    if path.exists():
        raise argparse.ArgumentTypeError(f"{given!r} is no model folder, and its name does not end in .gguf")
    if is_gguf or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", given):
        kind = "file" if is_gguf else "folder"
        raise argparse.ArgumentTypeError(
            f"there is no {kind} {given!r}; give a model folder, a GGUF file, a hub name, or demo"
        )
    return given


def positions(given: str) -> int | list[int]:
    """A position, or several, which a comma makes a list."""
    if not re.fullmatch(r"-?\d+(,-?\d+)*,?", given):
        raise argparse.ArgumentTypeError(f"{given!r} is no position; expected an integer, or several such as 3,8,-1")
    numbers = [int(item) for item in given.split(",") if item]
    return numbers if "," in given else numbers[0]


def layer(given: str) -> int | str:
    """A number, "all", or a hook's name such as blocks.5.attn.hook_z."""
    return int(given) if re.fullmatch(r"-?\d+", given) else given


def layers(given: str) -> int | str | list[int]:
    """A layer as of :func:`layer`, or several, which a comma makes a list."""
    if re.fullmatch(r"-?\d+(,-?\d+)*,?", given) and "," in given:
        return [int(item) for item in given.split(",") if item]
    return layer(given)


def positive(given: str) -> int:
    """A positive integer."""
    if not given.isdecimal() or int(given) == 0:
        raise argparse.ArgumentTypeError(f"{given!r} is not a positive integer")
    return int(given)


def seed(given: str) -> int:
    """An integer from 0 to 10,000."""
    if not given.isdecimal() or int(given) > 10_000:
        raise argparse.ArgumentTypeError(f"{given!r} is not an integer from 0 to 10,000")
    return int(given)


def rate(given: str) -> float:
    """A positive number."""
    try:
        value = float(given)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is out of range; it must be positive")
    return value


def fraction(given: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(given)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r} is not a number") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is out of range; it must be from 0 to 1")
    return value


def byte_count(given: str) -> int:
    """A number of bytes, with or without one of the suffixes K, M and G."""
    match = re.fullmatch(r"(\d+)([KMG]?)", given)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{given!r} is not a number of bytes such as 500000000, 512M or 2G")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """The type of a file to be written, whose name ends in one of ``suffixes`` and whose folder exists."""

    def checked(given: str) -> Path:
        path = Path(given)
        if path.suffix not in suffixes:
            raise argparse.ArgumentTypeError(f"{given!r} must end in {' or '.join(suffixes)}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{given!r} is a folder")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{given!r} lies in a folder that does not exist: {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"{given!r} cannot be written: no permission")
        return path

    return checked


def picture(given: str) -> Path:
    """A picture to be written."""
    return output_file(".svg", ".png", ".pdf")(given)


def data_file(given: str) -> Path:
    """A file of prompts or texts that exists."""
    path = Path(given).expanduser()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {given!r}")
    return path


def dictionary(given: str) -> Path:
    """A file of weights, .safetensors or .npz, or a folder."""
    path = Path(given).expanduser()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is no file {given!r}")
    if not path.is_dir() and path.suffix not in (".safetensors", ".npz"):
        raise argparse.ArgumentTypeError(f"{given!r} must be a folder, or end in .safetensors or .npz")
    return path
