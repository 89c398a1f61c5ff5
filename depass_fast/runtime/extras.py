"""Packages that only some calls need."""

from __future__ import annotations

import importlib.util


def needed(package: str, purpose: str, extra: str) -> None:
    """Raise ImportError where a package is not installed; the message says what for, and how to install it."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"{purpose}: the package {package} is not installed; pip install {package}, or pip install "
            f"'depass-fast[{extra}]'."
        )
