"""The parser of a command of bench."""

from __future__ import annotations

import argparse


def command(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser for ``python -m module``, described by the first line of the module's docstring."""
    return argparse.ArgumentParser(prog=f"python -m {module}", description=(doc or "").partition("\n")[0])
