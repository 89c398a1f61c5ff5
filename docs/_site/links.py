"""The finished site is checked: links inside lead somewhere, none outside is malformed, and no page fetches anything.

External links are not followed, as a build has no network; only their form is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_FORM = re.compile(r"https?://[a-z0-9-]+(\.[a-z0-9-]+)+(/[^\s<>\"]*)?", re.IGNORECASE)
_LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data"}
_NOT_LOADED = {"canonical", "index", "search", "next", "prev", "author", "genindex"}


class Page(HTMLParser):
    """A page's anchors, its links, and what a browser loads for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag == "link" and given.get("rel") not in _NOT_LOADED:
            self.loaded.add(given.get("href", ""))
        elif tag in _LOADED and _LOADED[tag] in given:
            self.loaded.add(given[_LOADED[tag]])


def faults(folder: Path) -> Iterator[str]:
    """Yield a line for each link of the site in a folder that leads nowhere, and for whatever it would fetch."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(folder).as_posix()
        for link in sorted(page.links | page.loaded):
            parts = urlsplit(link)
            if parts.scheme in ("data", "mailto", "javascript"):
                continue
            if parts.scheme or parts.netloc:
                if link in page.loaded:
                    yield f"{name}: fetches {link}"
                elif not _FORM.fullmatch(link):
                    yield f"{name}: no address: {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                yield f"{name}: no file: {link}"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name}: no anchor: {link}"


def check(app: Sphinx, error: Exception | None) -> None:
    """Check a build that went well; each fault is a warning, and so an error of the build."""
    if error is None and app.builder.format == "html":
        for fault in faults(Path(app.outdir).resolve()):
            logging.getLogger(__name__).warning("%s", fault, type="links")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("build-finished", check, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
