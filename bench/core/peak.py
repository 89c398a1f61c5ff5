"""Peaks of memory (:mod:`depass_fast.evaluate.peak`), measured in a process of its own.

``ru_maxrss`` would inherit the resident set of the process that forked this one.
"""

from __future__ import annotations

import subprocess
import sys

from depass_fast.evaluate.peak import measurable, measured

from .results import ROOT

__all__ = ["fresh_process", "measurable", "measured"]


def fresh_process(module: str, *arguments: object) -> int | None:
    """The number that ``python -m module arguments`` prints last, or None where peaks are not measurable."""
    if not measurable():
        return None
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1])
