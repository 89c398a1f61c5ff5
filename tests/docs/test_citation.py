"""CITATION.cff is of this version, which CHANGELOG.md has a section for; workflows run scripts that are here."""

import os
import re
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
    released = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["date-released"]
    assert f"## [{depass_fast.__version__}] - {released}\n" in changelog
    assert changelog.index("## [Unreleased]") < changelog.index(f"## [{depass_fast.__version__}]")


def test_the_citation_has_the_names_and_kinds_that_its_schema_wants():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["type"] == "software" and all({"name"} <= set(one) for one in citation["authors"])
    (paper,) = citation["references"]
    assert [one["family-names"] for one in paper["authors"]] == ["Hong", "Jiang", "Tian", "Qi", "Sun", "Ding", "Zhou"]
    assert all(set(one) == {"family-names", "given-names"} for one in paper["authors"])
    assert paper["type"] == "conference-paper" and paper["year"] == 2025 and "name" in paper["conference"]


def test_the_workflows_run_scripts_of_the_repository():
    for name in ("ci", "links", "release"):
        workflow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        runs = [step["run"].split()[0] for step in steps if "run" in step]
        assert runs == [".ci/run" if name == "ci" else f".ci/{name}"]
        assert os.access(ROOT / runs[0], os.X_OK)
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@[\w/.]+", step["uses"]) for step in steps if "uses" in step)


def test_the_site_of_main_alone_is_published():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    sites = {step["uses"]: step for step in jobs["run"]["steps"] if "site" in str(step.get("with"))}
    command = (ROOT / "docs/site.md").read_text(encoding="utf-8")
    assert all(f"docs {step['with']['path'].rstrip('/')}\n" in command for step in sites.values()) and len(sites) == 2
    publish = jobs["publish"]
    assert "refs/heads/main" in publish["if"] and publish["needs"] == "run"
    assert publish["permissions"] == {"pages": "write", "id-token": "write"}
    assert any(step["uses"].startswith("actions/deploy-pages@") for step in publish["steps"])
