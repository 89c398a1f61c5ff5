"""The numbers of the published implementation, `tests/data/golden`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
MODELS = ("llama_mha", "llama_gqa", "qwen2_gqa")
ABSOLUTE, RELATIVE = 1e-4, 1e-5


@cache
def load(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model, and every tensor that the published implementation returned for it, by the name of its case."""
    folder = GOLDEN / name
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    weights = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model, load_file(folder / "official.safetensors")


def cases() -> list:
    """The calls that were made to the published implementation, as parameters (model, case)."""
    found = []
    for model in MODELS:
        for case in json.loads((GOLDEN / model / "official.json").read_text())["cases"]:
            if case["call"] != "input":
                found.append(pytest.param(model, case, id=f"{model}/{case['name']}"))
    return found


def select(*calls: str) -> list:
    """The cases of some of the published calls."""
    return [case for case in cases() if case.values[1]["call"] in calls]


def agree(ours: torch.Tensor, case: dict, golden: dict) -> None:
    """Assert that a tensor is the published one of a case, up to the latter's own rounding."""
    published = golden[case["name"]]
    # without the final norm values reach 90, where the published float32 numbers themselves are 5e-4 off
    tolerance = max(ABSOLUTE, RELATIVE * float(published.abs().max()))
    assert ours.shape == published.shape
    assert float((ours.detach() - published).abs().max()) <= tolerance
