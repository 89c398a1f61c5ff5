"""docs/limits.md lists what is beyond plain layers by the names that errors have, and the types that have it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from depass_fast import DePass
from depass_fast.adapters.beyond import BEYOND_ONE_NORM, BEYOND_PLAIN, ROUTED_HEADS
from tests.support.family_models import VARIANTS, available, build_variant

TEXT = (Path(__file__).parents[2] / "docs" / "limits.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in TEXT.split("| graphs |\n")[1].split("\n\n")[0].splitlines()[1:]]


def test_every_name_has_a_row_that_says_what_graphs_know():
    assert {name: graphs for name, _, graphs in ROWS} == {
        name: "refused" if name in BEYOND_ONE_NORM else "drawn" for name in (*BEYOND_PLAIN, ROUTED_HEADS)
    }


@pytest.mark.thorough  # a model of every variant
def test_types_are_those_that_have_it():
    found: dict[str, set[str]] = {name: set() for name, *_ in ROWS}
    for variant, (model_type, _) in VARIANTS.items():
        for name in DePass(build_variant(variant)).adapter.beyond_plain if available(variant) else ():
            found[name].add(model_type)
    for types in found.values():
        types |= {"gemma3n"} if "gemma3n_text" in types else set()
    assert found == {name: set(re.findall(r"`(\w+)`", types)) for name, types, _ in ROWS}
