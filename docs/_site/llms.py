"""llms.txt at the site's root: the navigation, a line per page with its title, its address and its first sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx import addnodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx

LONGEST = 200  # characters of a page's first sentence


def lines(app: Sphinx) -> Iterator[str]:
    """Yield the lines of llms.txt: the home page's title and first paragraph, then each part of the navigation."""
    root = app.config.root_doc
    home = app.env.get_doctree(root)
    yield f"# {app.env.titles[root].astext()}\n"
    yield f"> {first_sentence(home)}"
    for toctree in home.findall(addnodes.toctree):
        yield f"\n## {toctree['caption']}\n"
        for page in toctree["includefiles"]:
            said = first_sentence(app.env.get_doctree(page))
            yield f"- [{app.env.titles[page].astext()}]({app.builder.get_target_uri(page)}){': ' if said else ''}{said}"


def first_sentence(page: nodes.document) -> str:
    """Return the first sentence of a page's first paragraph; empty where there is none."""
    for paragraph in page.findall(nodes.paragraph):
        if isinstance(paragraph.parent, nodes.section):
            text = " ".join(paragraph.astext().split())
            sentence = re.split(r"(?<=[.?])\s(?=[A-Z])", text)[0]
            return sentence if len(sentence) <= LONGEST else sentence[:LONGEST].rsplit(" ", 1)[0] + " …"
    return ""


def write(app: Sphinx, error: Exception | None) -> None:
    """Write llms.txt beside the pages of a build that went well."""
    if error is None and app.builder.format == "html":
        Path(app.outdir, "llms.txt").write_text("\n".join(lines(app)) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("build-finished", write)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
