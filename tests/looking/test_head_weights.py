"""`head_weights`: the model's own eager probabilities, and what its own kernels make of unit values."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from depass_fast import DePass
from depass_fast.methods import head_weights
from tests.support.family_models import available, build_variant
from tests.support.models import random_ids

IDS = random_ids(9, seed=3)


def engine(name: str, dtype: torch.dtype = torch.float64) -> DePass:
    if not available(name):
        pytest.skip(f"the installed transformers does not have {name}")
    return DePass(build_variant(name).to(dtype), progress=False)


@pytest.mark.parametrize("name", ["mistral: window", "gpt_oss", "gemma2", "falcon_h1"])
@torch.no_grad()
def test_probabilities_are_those_of_eager_attention(name, monkeypatch):
    monkeypatch.setattr(head_weights, "_QUERIES", 4)
    dp = engine(name, torch.float32)  # in which gpt-oss's experts run
    model: Any = dp.model
    model.set_attn_implementation("eager")
    wanted = model(torch.tensor([IDS]), output_attentions=True, use_cache=False).attentions[1][0]
    found = dp.head_weights(IDS, 1)
    assert found.shape[1:] == (9, 9) and found.dtype == torch.float32
    assert torch.allclose(found[: len(wanted)], wanted, atol=1e-6)
    assert (found[: len(wanted)].sum(-1) <= 1 + 1e-6).all() and not found.triu(1).any()
    assert (len(found) > len(wanted)) == (name == "falcon_h1")  # whose other heads are of the recurrence beside
    assert torch.equal(dp.head_weights(dp.trace(IDS), "blocks.1.attn.hook_pattern", [2, -1]), found[[2, -1]])


@torch.no_grad()
def test_a_recurrence_is_what_the_models_kernel_makes_of_unit_values(monkeypatch):
    dp, given = engine("qwen3_5_text"), []
    qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    kernel = qwen.torch_chunk_gated_delta_rule
    code = inspect.unwrap(qwen.Qwen3_5GatedDeltaNet.forward)
    spy = lambda *a, **more: given.append((a, more)) or kernel(*a, **more)  # noqa: E731
    monkeypatch.setitem(code.__globals__, "torch_chunk_gated_delta_rule", spy)
    dp.model(torch.tensor([IDS]), use_cache=False)
    (q, k, v, *rest), more = given[0]
    units = torch.zeros(9, *v.shape[1:], dtype=v.dtype)
    units[range(9), range(9)] = 1.0  # one position each
    ones = {name: x.expand(9, *x.shape[1:]) if isinstance(x, torch.Tensor) else x for name, x in more.items()}
    wanted = kernel(q.expand(9, -1, -1, -1), k.expand(9, -1, -1, -1), units, *rest, **ones)[0][..., 0]  # (k, q, H)
    found = dp.head_weights([IDS, IDS[:4]], 0)
    assert torch.allclose(found[0], wanted.permute(2, 1, 0).double(), atol=1e-6)  # the model's is in float32
    assert (found[0] < 0).any() and not found[0].triu(1).any() and found[1].shape == (len(found[0]), 4, 4)
    assert torch.allclose(found[1], found[0][:, :4, :4], atol=1e-12)
    # alone, the prompt's products have another shape, which may round otherwise
    assert torch.allclose(dp.head_weights(IDS, 0, -1), found[0][-1], atol=1e-12)


@torch.no_grad()
def test_differences_and_routed_heads():
    assert (engine("diffllama").head_weights(IDS, 0) < 0).any()
    sums = engine("jetmoe").head_weights(IDS, 0).sum(-1)
    assert (sums == 0).any() and (sums < 1).all() and (sums >= 0).all()


def test_refusals():
    dp = engine("nemotron_h")
    for ask, problem in (
        (lambda: dp.head_weights(IDS, 1), "layer 1 has no heads: it does not mix positions"),
        (lambda: dp.head_weights(IDS, 9), "layer: 9 is out of range"),
        (lambda: dp.head_weights(IDS, 0, 99), "head: 99 is out of range"),
        (lambda: engine("deepseek_v4").head_weights(IDS, 0), "values of this model are its keys"),
    ):
        with pytest.raises(ValueError, match=problem):
            ask()
