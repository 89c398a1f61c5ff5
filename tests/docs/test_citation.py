"""CITATION.cff names the version that the package has; CHANGELOG.md has a section for it."""

from pathlib import Path

import yaml

import depass_fast

ROOT = Path(__file__).parents[2]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "abstract"} <= set(citation)
    assert citation["version"] == depass_fast.__version__
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert "2510.18462" in paper["url"] and paper["title"].startswith("DePass: Unified Feature Attributing")


def test_the_changelog_has_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{depass_fast.__version__}]" in changelog
    assert changelog.index("## [Unreleased]") < changelog.index(f"## [{depass_fast.__version__}]")
