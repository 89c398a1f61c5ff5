"""Files outside docs/ that are pages of the site, and the links to them. In the repository they stay where they are.

Every file of `PAGES` becomes a page in docs/generated/ when a build begins. Links of all pages that lead to such a
file, by its path in the repository, lead to that page. Links to other files are left to MyST, which offers the file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
GENERATED = "generated"
PAGES = {
    "bench/RESULTS.md": f"{GENERATED}/results.md",
    "bench/README.md": f"{GENERATED}/benchmarks.md",
    "depass_fast/kernels/README.md": f"{GENERATED}/kernels.md",
    "CHANGELOG.md": f"{GENERATED}/changelog.md",
    "CONTRIBUTING.md": f"{GENERATED}/contributing.md",
    "SECURITY.md": f"{GENERATED}/security.md",
    "README.md": "index.md",  # the home page stands in its place
}
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)


def relinked(text: str, path: str, page: str) -> str:
    """Return a page's Markdown with its links to files as they are on the site.

    Args:
        text: the Markdown.
        path: where it lies in the repository, which its links start from.
        page: where it lies below docs/ on the site.
    """

    def leads(match: re.Match[str]) -> str:
        target = PurePosixPath(os.path.normpath(PurePosixPath(path).parent / match[2])).as_posix()
        if target in PAGES:
            return f"{match[1]}/{PAGES[target]}{match[3]}"
        if not (ROOT / target).exists():
            return match[0]  # MyST says so
        relative = os.path.relpath(target, PurePosixPath("docs") / PurePosixPath(page).parent)
        return match[1] + PurePosixPath(relative).as_posix() + match[3]

    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(leads, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(leads, text[end:])])


def write_pages(*_: Any) -> None:
    """Write docs/generated/, a page for each file; one that has not changed is left as it is."""
    folder = DOCS / GENERATED
    folder.mkdir(exist_ok=True)
    for path, page in PAGES.items():
        if not page.startswith(GENERATED) or not (ROOT / path).exists():
            continue
        text = relinked((ROOT / path).read_text(encoding="utf-8"), path, page)
        target = DOCS / page
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


def without_missing(text: str) -> str:
    """Return the home page without those patterns of its navigation that match no page: it is not there yet."""

    def line(match: re.Match[str]) -> str:
        return match[0] if any(DOCS.glob(f"{match[1]}.md")) else ""

    return re.sub(r"^(\S+\*)\n", line, text, flags=re.MULTILINE)


def relink(app: Sphinx, name: str, source: list[str]) -> None:
    """Rewrite the links of a page that is being read, and the navigation where it is the home page."""
    if name == app.config.root_doc:
        source[0] = without_missing(source[0])
    if not name.startswith(f"{GENERATED}/"):
        source[0] = relinked(source[0], f"docs/{name}.md", f"{name}.md")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("config-inited", write_pages)
    app.connect("source-read", relink)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
