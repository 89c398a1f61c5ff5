"""The page: one HTML file with its data, its styles and its scripts in it. Nothing is fetched, by policy of the page.

The pictures are Vega's (Vega-Lite, Vega-Embed), whose scripts the package `vl-convert-python` brings. Text goes into
the page by Jinja2, which escapes it; the data is JSON, in which nothing can end its element or begin another.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..runtime.paths import check_path
from ..version import __version__
from .fragment import environment, fragment
from .sheet import FORMAT, Sheet

FOLDER = Path(__file__).parent / "page"
SCRIPTS = (  # in the order in which they run; a view is one script that registers its kind
    "basics.js",
    "focus.js",
    "state.js",
    "picture.js",
    "grid.js",
    "table.js",
    "view_tokens.js",
    "view_map.js",
    "component_rows.js",
    "component_details.js",
    "heads_map.js",
    "view_components.js",
    "view_keys.js",
    "graph_model.js",
    "graph_places.js",
    "graph_picture.js",
    "graph_tables.js",
    "view_graph.js",
    "main.js",
)
STYLES = ("style.css", "views.css")
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def write_page(sheets: Sequence[Sheet], path: str | Path) -> None:
    """Write the page of some sheets, which shows the first.

    Raises:
        ImportError: a package of the extra ``report`` is not installed.
        ValueError: there is no sheet.
        OSError: there is no such folder (FileNotFoundError), or the file cannot be written.
    """
    check_path(path)
    Path(path).write_text(page(sheets), encoding="utf-8", errors="replace")


def page(sheets: Sequence[Sheet]) -> str:
    """Return the page of some sheets; errors as of :func:`write_page`."""
    if not sheets:
        raise ValueError("to_html: there is no result to be shown.")
    library = _library()
    scripts = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    own = f'(() => {{\n"use strict";\n{scripts}\n}})();'
    data = {"format": FORMAT, "made_by": f"depass_fast {__version__}", "sheets": [sheet.plain() for sheet in sheets]}
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            title=f"{sheets[0].target} · depass_fast",
            style="\n".join((FOLDER / name).read_text(encoding="utf-8") for name in STYLES),
            policy=_policy(library, own),
            data=embedded(data),
            library=library,
            own=own,
            fallback=fragment(sheets[:1], len(sheets) - 1),
        )
    )


def embedded(data: Any) -> str:
    """Return JSON that is safe inside a script element, whatever its texts hold: `<`, `>` and `&` are escaped."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _policy(*scripts: str) -> str:
    """Return the content security policy: these scripts alone run, and nothing is loaded from anywhere."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"


def check_library() -> None:
    """Raise ImportError where the package that brings the pictures' scripts is not installed."""
    if find_spec("vl_convert") is None:
        raise ImportError(
            "to_html: the pictures of a page are drawn by Vega, which the package vl-convert-python brings. It is not "
            "installed; pip install vl-convert-python, or pip install 'depass-fast[report]'."
        )
    environment()


@lru_cache(maxsize=1)
def _library() -> str:
    """Return the scripts of Vega-Embed, Vega-Lite and Vega, which define ``vegaEmbed``; made once in a process."""
    check_library()
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("\r", "").strip()
