"""The benchmark's baseline is the published algorithm: every number of the published implementation, reproduced.

`data/golden/<model>/official.json` lists the calls that were made to it, `official.safetensors` what they returned.
Absolute differences are at most 1e-4. States without the final norm (`all_layers`) hold values up to 90, and there the
published float32 numbers are themselves 1e-4 to 5e-4 from float64: 1e-5 of the largest value is what can be asked.
"""

from __future__ import annotations

import pytest
import torch

from bench.baselines.published import Published
from tests.support.published import ABSOLUTE, RELATIVE, cases, load


def run(model: torch.nn.Module, case: dict, golden: dict[str, torch.Tensor]) -> torch.Tensor:
    """The result of a case's published call, made to our own implementation."""
    settings, args = case.get("manager", {}), case.get("args", {})
    published = Published(
        model,
        rule=settings.get("mlp_decomposed_function", "softmax"),
        temperature=settings.get("mlp_softmax_temp", 0.1),
        ignore_special=settings.get("ignore_special_token", True),
    )
    ids, layer = torch.tensor(case["input_ids"]), args.get("start_layer_idx")
    calls = {
        "model": lambda: model(ids[None]).logits[0],
        "get_last_layer_decomposed_state": lambda: published.tokens(ids),
        "get_middle_to_last_decomposed_state": lambda: published.tokens(ids, layer),
        "get_middel_to_middle_decomposed_state": lambda: published.tokens(ids, layer, args["end_layer_idx"]),
        "all_layer_to_init_attribute_state": lambda: published.all_layers(ids),
        "compute_attribute_score": lambda: published.score(
            published.tokens(ids), args["token_idx"], args["decode_token_id"]
        ),
        "get_mlp_neuron_decomposed_state": lambda: published.neurons(ids, layer),
        "get_layer_module_decomposed_state": lambda: published.module(ids, layer, args["type"]),
        "get_subspace_decomposed_state": lambda: published.subspace(ids, layer, golden[args["attribute_state"]]),
        "get_subspace_decomposed_state_all_layer": lambda: published.subspace_all_layers(
            ids, layer, golden[args["attribute_state"]]
        ),
    }
    return calls[case["call"]]()


@torch.no_grad()
@pytest.mark.parametrize(("name", "case"), cases())
def test_reproduces_the_published_numbers(name: str, case: dict) -> None:
    model, golden = load(name)
    expected = golden[case["name"]]
    actual = run(model, case, golden)
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= max(ABSOLUTE, RELATIVE * expected.abs().max().item()), f"largest difference {error:.2e}"
