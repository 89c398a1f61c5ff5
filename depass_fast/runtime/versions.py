"""The check that the transformers at hand is one that the library works with, before anything of it is imported."""

from __future__ import annotations

import re
from importlib import metadata

OLDEST = (4, 51, 1)  # of transformers, as in setup.py


def check_transformers() -> None:
    """Check the version of transformers without importing it.

    Raises:
        ImportError: it is too old; the message says which is needed, and how to get it.
    """
    try:
        found = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return  # its own import says so
    if tuple(int(part) for part in re.findall(r"\d+", found)[:3]) >= OLDEST:
        return
    oldest = ".".join(map(str, OLDEST))
    raise ImportError(
        f"depass_fast needs transformers {oldest} or newer; found {found}. Run: pip install 'transformers>={oldest}'. "
        "Scripts of the published DePass, which asks for 4.44, run with it by python -m depass_fast.compat SCRIPT.py."
    )
