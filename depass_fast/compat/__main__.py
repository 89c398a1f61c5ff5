"""Run a script that imports the published package, unchanged: ``python -m depass_fast.compat SCRIPT.py ARGS``."""

from __future__ import annotations

import os
import runpy
import sys
from types import ModuleType

from .manager import decomposed_state_manager


def main(arguments: list[str]) -> None:
    """Run ``arguments[0]`` as the main program, with ``DePass`` standing for this package."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m depass_fast.compat SCRIPT.py [ARGS ...]\n\n" + __doc__)
        raise SystemExit(0 if arguments else 2)
    script = arguments[0]
    if not os.path.isfile(script):
        raise SystemExit(f"depass_fast.compat: there is no script {script!r}.")
    install()
    sys.argv = list(arguments)
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


def install() -> None:
    """Make ``DePass`` and ``DePass.manager`` importable; a package of that name on the path is not looked at."""
    package, manager = ModuleType("DePass"), ModuleType("DePass.manager")
    package.__path__ = []
    package.manager = manager
    for module in (package, manager):
        module.decomposed_state_manager = decomposed_state_manager
        sys.modules[module.__name__] = module


if __name__ == "__main__":
    main(sys.argv[1:])
