"""Keys that are values (DeepSeek V4): what attention gives is the model's own; its pieces and its transpose agree."""

from __future__ import annotations

import re

import pytest
import torch

from depass_fast import DePass, Heads, Tokens
from depass_fast.adapters.keyed import Grouped, entry_ratios
from depass_fast.adapters.maps import Linear
from depass_fast.compat import decomposed_state_manager
from depass_fast.trace import keyed
from depass_fast.trace.attention import attention_probabilities
from depass_fast.trace.keyed import FrozenKeyed
from tests.support.family_models import available, build_variant
from tests.support.models import random_ids

N = 23
KINDS = pytest.mark.parametrize("layer", [0, 1, 2], ids=["near keys", "selected entries", "all entries"])

pytestmark = pytest.mark.skipif(not available("deepseek_v4"), reason="the installed transformers is too old")


@pytest.fixture(scope="module")
def engine() -> DePass:
    return DePass(build_variant("deepseek_v4", implementation="eager").double())


@pytest.fixture(scope="module")
def trace(engine):
    return engine.trace(random_ids(N))


def frozen(engine, trace, layer, scale=None) -> FrozenKeyed:
    record = trace.layers[layer].attention
    return FrozenKeyed(engine.adapter.attention(layer), record, slice(0, N), record.q.dtype, scale)


def raw_values(engine, trace, layer) -> torch.Tensor:
    """The outputs of the projections to keys and to entries, (N, C)."""
    weights, record = engine.adapter.attention(layer), trace.layers[layer].attention
    return weights.norm.apply(record.resid, weights.scale(record.resid)) @ weights.w_v.T


@KINDS
@torch.no_grad()
def test_the_heads_and_what_they_write_are_the_models_own(layer):
    engine = DePass(build_variant("deepseek_v4", implementation="eager"))
    trace, seen, block = engine.trace(random_ids(N)), {}, engine.model.model.layers[layer].self_attn
    hooks = [
        block.o_a_proj.register_forward_pre_hook(lambda module, args: seen.update(heads=args[0][0].flatten(1))),
        block.o_b_proj.register_forward_hook(lambda module, args, out: seen.update(written=out[0])),
    ]
    engine.model(torch.tensor([random_ids(N)]))
    for hook in hooks:
        hook.remove()
    ours = frozen(engine, trace, layer).forward(raw_values(engine, trace, layer)[:, None])[:, 0]
    assert torch.allclose(ours, seen["heads"], atol=1e-5)
    assert torch.allclose(ours @ engine.adapter.attention(layer).w_o.T, seen["written"], atol=1e-5)


@KINDS
@torch.no_grad()
def test_pieces_later_starts_and_the_transpose_agree(engine, trace, layer, monkeypatch):
    width, heads = engine.adapter.attention(layer).v.shape[0], 4
    values, y = torch.randn(N, 3, width).double(), torch.randn(N, 3, heads * 8).double()
    one = torch.randn(N, width).double()
    whole = frozen(engine, trace, layer)
    out, (back, _) = whole.forward(values), whole.back(y)
    assert torch.isclose((out * y).sum(), (values * back).sum())
    again, found = whole.back(y, one)
    assert torch.allclose(again, back)
    by_head = (whole.forward(one[:, None]) * y).sum(0).view(3, heads, 8).sum(2)  # (B, H)
    assert torch.allclose(found.sum(0), by_head)
    monkeypatch.setattr(keyed, "_QUERIES", 4)
    monkeypatch.setattr(keyed, "_HELD", 0)
    pieces = frozen(engine, trace, layer)
    assert torch.allclose(pieces.forward(values), out) and torch.allclose(pieces.back(y)[0], back)
    for start in (1, 2, 7, 22):  # in front of a window, within one, and behind the last
        late = torch.cat([torch.zeros_like(values[:start]), values[start:]])
        scale = torch.rand(N).double()
        scaled = late[start:] * scale[start:, None, None]
        expected = whole.forward(torch.cat([late[:start], scaled]))[start:]
        assert torch.allclose(frozen(engine, trace, layer, scale).forward(late[start:], start), expected)


def test_a_window_of_weights_is_one_softmax_by_channel():
    """Entries that overlap take the first channels of the window before, and nothing in front of the first one."""
    module = torch.nn.Module()
    module.compress_rate, module.position_bias = 2, torch.randn(2, 4)
    module.kv_norm = torch.nn.Module()
    module.kv_norm.weight, module.kv_norm.variance_epsilon = torch.rand(2), 1e-6
    values, gates = torch.randn(5, 4), torch.randn(5, 4)
    ratio = entry_ratios(values, gates, module, overlaps=True)
    assert not ratio[4].any() and not ratio[2:, :2].any()  # behind the last window, and what no later entry takes
    biased = gates[:4] + module.position_bias.repeat(2, 1)
    for entry, slots in enumerate((biased[:2, 2:], torch.cat([biased[:2, :2], biased[2:, 2:]]))):
        taken = values[:2, 2:] if entry == 0 else torch.cat([values[:2, :2], values[2:4, 2:]])
        pooled = (slots.softmax(0) * taken).sum(0)
        normed = pooled * torch.rsqrt(pooled.square().mean() + 1e-6) * module.kv_norm.weight
        own = ratio[:2, 2:] if entry == 0 else torch.cat([ratio[:2, :2], ratio[2:4, 2:]])
        assert torch.allclose((own * taken).sum(0), normed, atol=1e-6)


def test_groups_of_heads_are_one_projection():
    front, behind = torch.nn.Linear(6, 8, bias=False), torch.nn.Linear(8, 5, bias=False)
    both = Grouped(behind, front=Linear(front), groups=2)
    x = torch.randn(3, 12)
    parts = [x[:, :6] @ front.weight[:4].T, x[:, 6:] @ front.weight[4:].T]
    assert torch.allclose(both.entering(x), torch.cat(parts, 1), atol=1e-6)
    assert both.shape == both.weight.shape == (5, 12)
    assert torch.allclose(x @ both.weight.T, behind(both.entering(x)), atol=1e-6)


def test_a_cut_trace_and_a_saved_one(engine, trace, tmp_path):
    early = engine.attribute(trace, Tokens(), 5, position=9)
    alone = engine.attribute(random_ids(N)[:10], Tokens(), 5)
    assert torch.allclose(early.scores[:10], alone.scores, atol=1e-9) and not early.scores[10:].any()
    torch.save(trace, tmp_path / "trace.pt")
    again = torch.load(tmp_path / "trace.pt", weights_only=False)
    assert torch.equal(engine.attribute(again, Heads(1), 5).scores, engine.attribute(trace, Heads(1), 5).scores)
    assert engine.attribute(trace, Tokens(), 5, verify=True).completeness_error <= 1e-12


def test_only_selected_entries_are_kept(engine, trace):
    assert trace.layers[1].attention.chosen_keys.shape == (N, 1) and trace.layers[2].attention.chosen_keys is None
    short = engine.trace(random_ids(3))  # one entry alone: nothing to choose
    assert short.layers[1].attention.chosen_keys is None


def test_what_has_no_meaning_is_refused(engine, trace):
    record, every = trace.layers[1].attention, torch.arange(N)
    with pytest.raises(ValueError, match="values that are keys are turned"):
        attention_probabilities(record, every, every, torch.float64)
    with pytest.raises(ValueError, match=re.escape("the published interface is for models")):
        decomposed_state_manager(engine.model, None)
    with pytest.raises(ValueError, match="attention's own book is for models"):
        engine.ledger(trace, 5, rule="half", attention=True)
