"""Run what imports the published package, unchanged: a script, a module or a notebook.

    python -m depass_fast.compat SCRIPT.py ARGS
    python -m depass_fast.compat -m MODULE ARGS      (jupyter lab, torch.distributed.run, ...)
    python -m depass_fast.compat NOTEBOOK.ipynb      (needs IPython)

In a notebook of your own write `%load_ext depass_fast.compat` in its first cell; in a script,
`import depass_fast.compat.install`.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys

from .stand_in import stand_in


def main(arguments: list[str]) -> None:
    """Run a program with ``arguments``; what it and its workers import as ``DePass`` is this package."""
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        print("usage: python -m depass_fast.compat SCRIPT.py [ARGS ...]\n\n" + (__doc__ or ""))
        raise SystemExit(0 if arguments and arguments != ["-m"] else 2)
    if arguments[0] == "-m":
        _stand_in()
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    script = arguments[0]
    if not os.path.isfile(script):
        raise SystemExit(f"depass_fast.compat: there is no script {script!r}.")
    if script.endswith(".ipynb"):
        _run_notebook(arguments)
        return
    sys.argv = list(arguments)
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # what `python -m` put there; a script has its own folder
    _stand_in()
    sys.path.insert(1, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")


def _stand_in() -> None:
    try:
        stand_in()
    except ImportError as error:
        raise SystemExit(f"depass_fast.compat: {error}") from error


def _run_notebook(arguments: list[str]) -> None:
    """Run the cells of a notebook in order, in IPython, in the notebook's folder as Jupyter does."""
    if importlib.util.find_spec("IPython") is None:
        raise SystemExit(
            "depass_fast.compat: a notebook needs IPython: pip install ipython. In Jupyter, write `%load_ext "
            "depass_fast.compat` in its first cell."
        )
    from IPython import start_ipython

    _stand_in()
    folder, name = os.path.split(os.path.abspath(arguments[0]))
    os.chdir(folder)
    start_ipython(argv=[name, *arguments[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
