"""The parser of a command of bench, and the files that it writes: refused before any work if they cannot be written."""

from __future__ import annotations

import argparse
from pathlib import Path


def command(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser for ``python -m module``, described by the first line of the module's docstring."""
    return argparse.ArgumentParser(prog=f"python -m {module}", description=(doc or "").partition("\n")[0])


def writable(text: str) -> Path:
    """The type of an argument that names a file to write. Folders that are missing are made."""
    path, is_new = Path(text), not Path(text).exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):  # to ask for permission is no answer: a folder may take no files at all
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{path}: it cannot be written ({error.strerror}); give another one."
        ) from error
    return path


def picture(text: str) -> Path:
    """The type of an argument that names a picture to draw, which needs matplotlib."""
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports] (the extra `bench`)
    except ImportError as error:
        message = "a picture needs matplotlib: pip install -c constraints.txt matplotlib"
        raise argparse.ArgumentTypeError(message) from error
    return writable(text)
