"""The table in docs/families.md is the one that the committed measurements give, and names every family."""

import pytest
import transformers

from bench.core.results import ROOT
from bench.studies.families import KNOWN, PAGE, committed, unexplained, with_refused, with_table, with_types
from depass_fast.adapters import supported_families
from tests.support.family_models import VARIANTS


def test_the_page_has_the_table_of_the_committed_results():
    page = PAGE.read_text()
    assert with_table(page, committed()) == page, "run python -m bench.studies.families"


def test_the_page_has_the_errors_of_the_code():
    page = PAGE.read_text()
    assert with_refused(page) == page, "run python -m bench.studies.families"
    refused = page.split("## Refused")[1]
    assert "`deepseek_v32`" in refused and "altup_active_idx" in refused


def test_every_family_is_tested_and_named():
    of_another = {"emu3_text_model", "mllama_text_model"}  # what AutoModelForCausalLM makes of an Emu 3, a Mllama
    of_another |= {"gemma3n"}  # its towers need timm: tests/propagation/test_streams.py
    assert set(KNOWN) == set(supported_families()) - of_another == {model_type for model_type, _ in VARIANTS.values()}
    newest = committed()[-1]
    assert set(newest["variants"]) == set(VARIANTS)
    assert all(measured["completeness float32"] <= 1e-5 for measured in newest["variants"].values())


@pytest.mark.skipif(transformers.__version__ != "5.23.0", reason="the table is that of transformers 5.23.0")
def test_every_type_of_transformers_runs_or_has_a_reason():
    assert unexplained() == [], "add a family, or a reason to depass_fast/adapters/unsupported.py"
    page = PAGE.read_text()
    assert with_types(page) == page, "run python -m bench.studies.families"


def test_the_example_of_the_guide_is_the_file():
    family = ROOT / "depass_fast/adapters/families/gpt_bigcode.py"
    assert f"```python\n{family.read_text()}```" in (ROOT / "docs/adding-a-family.md").read_text()


def test_a_family_is_a_short_file():
    paths = sorted((ROOT / "depass_fast/adapters/families").glob("*.py"))
    assert len(paths) > 30
    for path in paths:
        assert len(path.read_text().splitlines()) < 60, path.name
