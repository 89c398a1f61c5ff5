"""Fixtures and hooks of all tests; models, components and comparisons are in tests/support."""

from __future__ import annotations

import gc
import json
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers

pytest.register_assert_rewrite("tests.support")
if not torch.cuda.is_available():  # before any kernel is imported: without a GPU they are interpreted
    os.environ["TRITON_INTERPRET"] = "1"

from depass_fast import DePass
from depass_fast.demo import load_demo
from tests.support import interpreter
from tests.support.family_models import FIRST, FIRST_OF_FILE, VARIANTS
from tests.support.models import FAMILIES, build

interpreter.round_as_a_gpu_does()
ONCE = {"once_a_family": FIRST, "once_a_file": FIRST_OF_FILE}
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


@pytest.fixture(params=FAMILIES)
def family(request) -> DePass:
    return build(request.param)


@pytest.fixture(scope="session")
def demo() -> DePass:
    return DePass(*load_demo())


# -- what tests/adapters/test_families.py measures --------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--family-results", metavar="FILE.json", help="where test_families.py writes what it measures")
    parser.addoption("--thorough", action="store_true", help="every combination; minutes more, for a release")


def pytest_collection_modifyitems(config, items):
    """All tests of a variant together: they share its models and traces."""
    if not config.getoption("--thorough"):
        left_out = [item for item in items if is_thorough(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not is_thorough(item)]
    first = [i for i, item in enumerate(items) if item.path.parts[-2:] == ("adapters", "test_families.py")]
    chosen = sorted((items[i] for i in first), key=lambda item: list(VARIANTS).index(item.callspec.params["name"]))
    for i, item in zip(first, chosen, strict=True):
        items[i] = item


def pytest_collection_finish():
    """Freeze what imports have made: looking through it takes a second each time that a test collects garbage."""
    gc.collect()
    gc.freeze()


def is_thorough(item) -> bool:
    """A combination of what other tests hold apart is for --thorough alone."""
    if item.get_closest_marker("thorough"):
        return True
    marked = {mark: item.get_closest_marker(mark) for mark in ONCE}
    return any(marked[mark] and item.callspec.params["name"] not in first for mark, first in ONCE.items())


@pytest.fixture(scope="session")
def family_results(request):
    """Takes a variant's name, what was measured, and the value; the largest is kept, or every name."""
    measured = defaultdict(dict)

    def note(name: str, what: str, value: float | str) -> None:
        before = measured[name].get(what)
        if isinstance(value, str):
            measured[name][what] = sorted({*(before or ()), value})
        else:
            measured[name][what] = value if before is None else max(before, value)

    yield note
    if path := request.config.getoption("--family-results"):
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        Path(path).write_text(json.dumps({**versions, "variants": measured}, indent=1) + "\n")
