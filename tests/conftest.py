"""Small random models of every supported family, all norm weights and biases randomised."""

from __future__ import annotations

import functools
import json
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers

if not torch.cuda.is_available():  # before any kernel is imported: without a GPU they are interpreted
    os.environ["TRITON_INTERPRET"] = "1"

import interpreter

from bench.family_models import VARIANTS, build_model
from depass_fast import DePass
from depass_fast.demo import load_demo

interpreter.round_as_a_gpu_does()
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

# name -> (model_type, what differs from the shape of bench/family_models.py)
FAMILIES = {
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", {"num_key_value_heads": 2}),
    "llama-biases": ("llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 3}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen2-window": (
        "qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3-biases": ("qwen3", {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True}),
}


@functools.cache
def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> DePass:
    """A random model of a family; shared by the tests, which never change it."""
    model_type, changes = FAMILIES[name]
    return DePass(build_model(model_type, seed=seed, **changes).to(dtype))


def random_ids(length: int, seed: int = 0, vocabulary: int = 64) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (length,), generator=generator).tolist()


@pytest.fixture(params=FAMILIES)
def family(request) -> DePass:
    return build(request.param)


@pytest.fixture(scope="session")
def demo() -> DePass:
    return DePass(*load_demo())


# -- what tests/test_families.py measures -----------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--family-results", metavar="FILE.json", help="write what tests/test_families.py measures")


def pytest_collection_modifyitems(items):
    """All tests of a variant together: they share its models and traces."""
    first = [i for i, item in enumerate(items) if item.path.name == "test_families.py"]
    chosen = sorted((items[i] for i in first), key=lambda item: list(VARIANTS).index(item.callspec.params["name"]))
    for i, item in zip(first, chosen, strict=True):
        items[i] = item


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
