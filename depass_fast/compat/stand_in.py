"""The stand-in for the published package: how `import DePass` comes to mean this one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..runtime.versions import check_transformers

STANDIN = Path(__file__).parent / "standin"  # holds a package `DePass`


def stand_in() -> None:
    """Put the stand-in first on the module search path, here and for workers, and bridge what is broken.

    Raises:
        ImportError: another `DePass` has been imported already; transformers is too old.
    """
    check_transformers()
    from .bridges import bridge  # imports transformers

    known = getattr(sys.modules.get("DePass"), "__file__", None)
    if known is not None and not Path(known).is_relative_to(STANDIN):
        raise ImportError(
            f"DePass: it has been imported already, from {known}. Start anew (in a notebook: restart the kernel), and "
            "load depass_fast.compat first."
        )
    if str(STANDIN) not in sys.path:
        sys.path.insert(0, str(STANDIN))
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(STANDIN) not in inherited:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(STANDIN), *filter(None, inherited)])
    bridge()
