"""GGUF files: the place of one for transformers, and what is refused before any of it is loaded."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

_PACKAGES = ("gguf", "accelerate")  # the one reads the file, without the other transformers loads none
_REPOSITORY = ("revision", "subfolder")  # arguments about a repository of the hub
_READS = threading.Lock()
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)


def located(path: str | os.PathLike[str], arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The folder or hub name, and the arguments, by which transformers loads what ``path`` and ``arguments`` name.

    A path that ends in .gguf, in any case, names a file, unless it is a folder or ``gguf_file`` is among the arguments.
    A file on this machine is returned as an absolute ``gguf_file``: transformers takes the weights of a relative one
    from the working directory, if there is one of that name.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is no GGUF file or a part of one, or an argument is about a repository of the hub.
        ImportError: a package that loads GGUF files is not installed.
    """
    is_local = isinstance(path, os.PathLike)  # the hub's names are text
    path, name = os.fspath(path), arguments.get("gguf_file")
    place = Path(path)
    with contextlib.suppress(RuntimeError):  # of a user who is not known here
        place = place.expanduser()
    if name is not None and place.is_dir():
        file = place / (arguments.get("subfolder") or "") / name
        arguments = {key: value for key, value in arguments.items() if key != "subfolder"}
    elif name is None and place.suffix.lower() == ".gguf" and not place.is_dir():
        file = place
        _refuse_repository(arguments)
    elif name is not None and place.is_file():
        raise ValueError(
            f"model_kwargs: gguf_file={name!r} beside a path that is a file itself; leave one of them out."
        )
    else:  # on the hub, or no GGUF file at all
        if name is not None:
            _check_packages(name)
        if place.exists():
            return str(place), arguments
        if is_local or place.is_absolute() or path.startswith((".", "~")) or "\\" in path or path.count("/") > 1:
            raise FileNotFoundError(f"path: there is no folder or file {path!r}.")
        return path, arguments
    _check(file)
    return str(file.parent), arguments | {"gguf_file": str(file.absolute())}


@contextlib.contextmanager
def reading(file: str | None) -> Iterator[None]:
    """Tell the errors of transformers about a GGUF file as ValueErrors; without a file they stay as they are."""
    try:
        yield
    except (ImportError, MemoryError, TypeError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file ends in errors of nearly any kind
        if file is None:
            raise
        text = " ".join(str(error).split())
        if "architecture" in text or "model_type" in text:
            raise ValueError(
                f"path: {file} is of an architecture that transformers {transformers.__version__} does not load from "
                f"GGUF files ({text}). A newer transformers may; else give the folder of the model that it was made of."
            ) from error
        raise ValueError(
            f"path: {file} cannot be loaded ({type(error).__name__}: {text}). If it is damaged or cut short, copy it "
            "again."
        ) from error


@contextlib.contextmanager
def read_once(file: str | None) -> Iterator[None]:
    """Let transformers read the header of a GGUF file once; without a file nothing is done.

    It reads it for the config, the weights and the tokenizer, twice for some, and a vocabulary of 262,144 tokens takes
    the package gguf seconds each time. Other threads that load a file wait.
    """
    if file is None:
        yield
        return
    import gguf

    with _READS:
        reader = gguf.GGUFReader
        gguf.GGUFReader = functools.lru_cache(reader)
        try:
            yield
        finally:
            gguf.GGUFReader = reader


def _refuse_repository(arguments: dict[str, Any]) -> None:
    for name in _REPOSITORY:
        if arguments.get(name):
            raise ValueError(
                f"model_kwargs: {name}={arguments[name]!r} is about a repository of the hub, and path names a file on "
                f"this machine; leave it out, or give the repository's name as path and the file's as gguf_file."
            )


def _check(file: Path) -> None:
    """Raise if ``file`` is not there, is no whole GGUF file, or cannot be read for want of a package."""
    if not file.is_file():
        others = sorted(other.name for other in file.parent.glob("*.[gG][gG][uU][fF]"))
        hint = f" {file.parent} holds {', '.join(others[:5])}." if others else ""
        raise FileNotFoundError(
            f"path: there is no file {str(file)!r}.{hint} A file on the hub is named by its repository as path and "
            f"model_kwargs={{'gguf_file': {file.name!r}}}."
        )
    with file.open("rb") as opened:
        start = opened.read(4)
    if start != b"GGUF":
        raise ValueError(f"path: {file} is no GGUF file: it begins with {start!r}, not with b'GGUF'.")
    part = _PART.search(file.name)
    if part and int(part[1]) > 1:
        raise ValueError(
            f"path: {file} is one of {int(part[1])} parts of a model, and transformers reads a whole one only; join "
            "them with `llama-gguf-split --merge` of llama.cpp."
        )
    _check_packages(str(file))


def _check_packages(file: str) -> None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"path: {file} is a GGUF file, and transformers needs {' and '.join(missing)} to load one: "
            "pip install 'depass-fast[gguf]'"
        )
