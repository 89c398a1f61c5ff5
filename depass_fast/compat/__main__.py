"""Run a script that imports the published package, unchanged: ``python -m depass_fast.compat SCRIPT.py ARGS``."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

STANDIN = Path(__file__).parent / "standin"  # holds a package `DePass`


def main(arguments: list[str]) -> None:
    """Run ``arguments[0]`` as the main program; what it and its workers import as ``DePass`` is this package."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m depass_fast.compat SCRIPT.py [ARGS ...]\n\n" + (__doc__ or ""))
        raise SystemExit(0 if arguments else 2)
    script = arguments[0]
    if not os.path.isfile(script):
        raise SystemExit(f"depass_fast.compat: there is no script {script!r}.")
    sys.argv = list(arguments)
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # what `python -m` put there; a script has its own folder
    sys.path[:0] = [str(STANDIN), os.path.dirname(os.path.abspath(script))]
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(STANDIN), *([inherited] if inherited else [])])  # for its workers
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
