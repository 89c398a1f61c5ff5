"""The site without a build: its navigation names every page, its reference every public name."""

from __future__ import annotations

import importlib.util
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

import depass_fast

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = "generated/"  # pages that a build writes
HOME = (DOCS / "index.md").read_text(encoding="utf-8")
NOTEBOOK = re.compile(r"^---\n(.*?)^---\n", re.MULTILINE | re.DOTALL)


def extension(name: str):
    """An extension of the site, which is no package."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / f"_site/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages() -> set[str]:
    """The pages of docs/ as the navigation names them, without those that a build writes, and without the home page."""
    found = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    return {name for name in found if not name.startswith((GENERATED, "_site/"))} - {"index"}


def navigation(text: str) -> list[str]:
    """The entries of a page's toctrees, in order."""
    blocks = re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and line[0] != ":"]


def test_the_navigation_names_every_page_once():
    entries = navigation(HOME)
    for name in pages():
        assert sum(fnmatch(name, entry) for entry in entries) == 1, f"docs/{name}.md: in no toctree of docs/index.md"


def test_the_navigation_names_nothing_else():
    written = {page.removesuffix(".md") for page in extension("outside").PAGES.values()} | {"generated/commands"}
    for entry in navigation(HOME):
        assert "*" in entry or entry in pages() | written, f"docs/index.md: there is no page {entry}"


def test_every_part_of_the_navigation_has_a_caption():
    assert HOME.count("```{toctree}") == HOME.count(":caption: ") == HOME.count(":hidden:")


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    shown = re.findall(r"\.\. auto\w+:: depass_fast\.([\w.]+)", text)
    assert len(set(shown)) == len(shown)
    calls = {
        f"DePass.{name}"
        for base in depass_fast.DePass.__mro__
        for name in vars(base)
        if name[0] != "_" and base is not object
    }
    expected = {*depass_fast.__all__, *calls} - {"__version__"}
    lacking, unknown = sorted(expected - set(shown)), sorted(set(shown) - expected)
    assert not lacking, f"add `.. autoclass::` or `.. automethod::` to a page of docs/reference/ for {lacking}"
    assert not unknown, f"docs/reference/: {unknown}"


@pytest.mark.parametrize("name", sorted(pages()))
def test_notebooks_say_that_they_are(name):
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    front = NOTEBOOK.match(text)
    cells = re.findall(r"^```\{code-cell\} python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert text.count("```{code-cell}") == len(cells)
    assert bool(cells) == bool(front)
    if front:
        assert yaml.safe_load(front[1]) == {"file_format": "mystnb", "kernelspec": {"name": "python3"}}
        for cell in cells:
            compile(cell, f"docs/{name}.md", "exec")
    if name.startswith("tutorials/"):
        assert "from depass_fast.demo import" in cells[0] and not re.search(
            r"from_pretrained|https?://", "".join(cells)
        )
        assert sum(cell.count("\nassert ") + cell.count("\n    assert ") for cell in cells) >= 3
        assert "\n## What is shown, and what is not\n" in text


def test_links_to_files_outside_lead_to_their_pages():
    relinked = extension("outside").relinked
    text = (
        "[a](../bench/RESULTS.md#results) [b](scale.md) `[c](../README.md)`\n"
        "```text\n[d](../README.md)\n```\n[e](../setup.py)"
    )
    assert relinked(text, "docs/api.md", "api.md") == (
        "[a](/generated/results.md#results) [b](scale.md) `[c](/index.md)`\n"
        "```text\n[d](../README.md)\n```\n[e](../setup.py)"
    )
    assert (
        relinked("[a](../docs/rules.md#advice)", "bench/README.md", "generated/benchmarks.md")
        == "[a](../rules.md#advice)"
    )


def test_patterns_without_a_page_leave_the_navigation():
    text = "```{toctree}\napi\nnot-there-yet*\nrule*\n```\n"
    assert extension("outside").without_missing(text) == "```{toctree}\napi\nrule*\n```\n"


def test_faults_of_finished_pages_are_found(tmp_path):
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there">1</a> <a href="b.html#nowhere">2</a> <a href="c.html">3</a> <a href="#here">6</a>'
        '<script src="https://cdn.org/x.js"></script> <a href="https://arxiv.org/abs/2510.18462">5</a>'
        '<a href="https://x.org/y z">4</a>'
    )
    (tmp_path / "b.html").write_text('<h1 id="there">there</h1> <a href="a.html">back</a>')
    assert sorted(extension("links").faults(tmp_path)) == [
        "a.html: fetches https://cdn.org/x.js",
        "a.html: no address: https://x.org/y z",
        "a.html: no anchor: #here",
        "a.html: no anchor: b.html#nowhere",
        "a.html: no file: c.html",
    ]
