"""The invariant of the library: shares sum to the whole, at every layer, for every family, kind, rule and dtype."""

import pytest
import torch

from depass_fast import Custom, Heads, Neurons, Tokens
from depass_fast.allocation import NAMES
from depass_fast.linear_rules import LINEAR_RULES
from tests.support.components import kinds
from tests.support.models import FAMILIES, build, random_ids
from tests.support.steps import start_state

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_sums_to_the_logit(name, dtype):
    dp, ids = build(name, dtype), random_ids(7, seed=3)
    for backend in ("reference", "torch"):
        for label, kind in kinds(len(ids)).items():
            # in half precision, the model's own token: a logit near zero is all rounding of the final norm
            target = [None] if dtype.itemsize == 2 else [None, 5, (9, 3)]
            result = dp.attribute(ids, kind, target, backend=backend)
            assert result.completeness_error <= TOLERANCE[dtype], (label, backend)
            assert result.layer_errors.isfinite().all()
            assert (result.scores.sum(1) - result.target_logits).abs().max() <= (
                TOLERANCE[dtype] * result.scores.abs().sum(1).max()
            )


@pytest.mark.parametrize(
    ("name", "rule"),  # a rule knows nothing of the attention: all of them where there are biases, else two
    [(name, rule) for name in FAMILIES for rule in NAMES if name == "llama-biases" or rule in ("softmax", "shapley")],
)
def test_every_rule_sums_to_the_whole_at_every_layer(name, rule):
    ids = random_ids(9, seed=4)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        dp = build(name, dtype)
        trace = dp.trace(ids)
        for label, kind in kinds(len(ids)).items():
            if isinstance(kind, Custom) and dtype == torch.bfloat16 and rule in LINEAR_RULES:
                continue  # states unrelated to x: Σ|X| is far above |x|, so is the rounding
            for exclude in (True, False) if isinstance(kind, Tokens) else (True,):
                result = dp.attribute(trace, kind, allocation=rule, method="exact", exclude_special=exclude)
                assert result.layer_errors.max() <= TOLERANCE[dtype], (label, dtype)
                assert result.completeness_error <= TOLERANCE[dtype], (label, dtype)


def test_states_sum_to_the_residual_stream_at_every_layer(family):
    ids = random_ids(8)
    trace = family.trace(ids)
    for end in range(family.adapter.n_layers + 1):
        total = family.decompose(trace, Tokens(), end=end).dense().sum(1)
        assert torch.allclose(total, trace.resid(end), rtol=0, atol=1e-5 * float(trace.resid(end).abs().max()) * 2)
    normed = family.decompose(trace, Tokens()).dense().sum(1)
    assert torch.allclose(normed, trace.normed_final, rtol=0, atol=2e-5 * float(trace.normed_final.abs().max()))


def test_heads_are_what_the_projection_adds(family):
    """Σ heads + bias is the attention module's output, Σ neurons + bias the MLP's."""
    ids, layer = random_ids(6), 1
    outputs, handles = {}, []
    for part, path in {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}.items():
        module = family.adapter.blocks[layer].get_submodule(path)
        handles.append(module.register_forward_hook(lambda m, a, out, part=part: outputs.__setitem__(part, out[0])))
    trace = family.trace(ids)
    for handle in handles:
        handle.remove()
    for part, kind in {"attention": Heads(layer), "mlp": Neurons(layer)}.items():
        state, labels = _initial(family, trace, kind)
        named = state[:, [i for i, label in enumerate(labels) if label != "rest"]].sum(1)
        assert torch.allclose(named, outputs[part], atol=1e-4), part


def _initial(dp, trace, kind):
    if kind.site == "resid_post":
        state = dp.decompose(trace, kind, end=kind.layer + 1)
        return state.dense(), state.labels
    state = start_state(dp, trace, kind)
    return state.dense(), state.labels


def test_bias_is_there_only_where_constants_are_to_come():
    ids = random_ids(5)
    assert "bias" not in build("llama-gqa").attribute(ids, Tokens()).labels
    assert build("qwen2").attribute(ids, Tokens()).labels[-1] == "bias"
    assert "bias" not in build("qwen2").attribute(ids, Neurons(-1)).labels
    assert build("qwen2").attribute(ids, Heads(-1)).labels[-2:] == ["rest", "bias"]
    assert build("llama-biases").attribute(ids, Neurons(-1)).labels[-2:] == ["rest", "bias"]
