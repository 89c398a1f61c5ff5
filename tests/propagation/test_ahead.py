"""LongCat's layers: experts that read ahead of the layer that adds them, and experts that give back what they read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from depass_fast import DePass, Heads, Neurons, Tokens
from depass_fast.components.base import Entry
from depass_fast.propagation.joint import can_propagate_jointly
from depass_fast.propagation.layer import through_mlp
from tests.support.family_models import available, build_variant
from tests.support.models import random_ids

NAME = "longcat_flash"
IDS = random_ids(8)
pytestmark = pytest.mark.skipif(not available(NAME), reason="the installed transformers is too old")


@pytest.fixture(scope="module")
def dp() -> DePass:
    return DePass(build_variant(NAME).double())


@pytest.fixture(scope="module")
def trace(dp):
    return dp.trace(IDS)


def test_a_block_is_two_layers(dp, trace):
    assert dp.adapter.n_layers == len(trace.layers) == 2 * len(dp.model.model.layers)
    assert dp.adapter.block(2) is dp.adapter.block(3) is dp.model.model.layers[1]
    for layer, record in enumerate(trace.layers):
        ahead = [part for part in record.mlps if part.source is not None]
        assert bool(ahead) == (layer % 2 == 1) and all(part.source == layer - 1 for part in ahead)
        assert all(part.resid is trace.layers[layer - 1].resid_mid for part in ahead)
    whole = trace.resid(2) - trace.layers[1].resid_mid
    by_hand = sum(
        part.dense(part.act, slice(0, len(IDS))) @ dp.adapter.mlps(1)[part.part].w_down.T
        for part in trace.layers[1].mlps
    )
    assert torch.allclose(by_hand, whole, atol=1e-12)


@torch.no_grad()
def test_what_started_behind_gets_nothing_of_what_experts_read_ahead(dp, trace):
    """All that they write is a constant of the components' way: it goes to `bias`, at every position."""
    layer, record = dp.adapter.layer(1), trace.layers[1]
    alone = replace(record, mlps=tuple(part for part in record.mlps if part.source is not None))
    state = dp.start(trace, Heads(1))
    before = state.dense().clone()
    after = through_mlp(state, None, layer, alone, dp.options.build(dp.adapter))
    gained, bias = after.dense() - before, after.labels.index("bias")
    (own,) = (part for part in record.mlps if part.source is None)
    written = trace.resid(2) - record.resid_mid - own.act @ layer.mlps[own.part].w_down.T
    assert torch.allclose(gained[:, bias], written, atol=1e-12) and written.norm() > 1
    assert not gained[:, :bias].any() and not gained[:, bias + 1 :].any()


@torch.no_grad()
def test_an_expert_that_gives_back_shares_nothing_out(dp, trace):
    """Under the softmax, too, every component gets its own part back: nothing competes."""
    layer, record = dp.adapter.layer(1), trace.layers[1]
    (part,) = (part for part in record.mlps if layer.mlps[part.part].is_linear)
    assert part.router_weight.min() > 0 and part.host_positions is None
    here = replace(record, mlps=(replace(part, source=None),))
    state = dp.start(trace, Heads(0))
    before = state.dense().clone()
    mlp = replace(layer.mlps[part.part], source=None)
    weights = replace(layer, mlps=tuple(mlp if one.is_linear else one for one in layer.mlps))
    gained = through_mlp(state, None, weights, here, dp.options.build(dp.adapter)).dense() - before
    factor = (mlp.norm.scale(part.resid) * part.router_weight)[:, None] * mlp.norm.weight
    assert torch.allclose(gained, before * factor[:, None], atol=1e-12)
    assert "L1sameN3" in dp.start(trace, Neurons(1)).labels


def test_copies_are_kept_as_long_as_they_are_read(dp, trace):
    state = dp.carry(trace, dp.start(trace, Tokens()), 1)
    assert set(state.earlier) == {Entry(0, "resid_mid")}
    assert not dp.carry(trace, state, 2).earlier
    assert not can_propagate_jointly(trace, dp.options.build(dp.adapter))
    both = dp.attribute(trace, Heads(layers=[0, 1]), 5)
    for layer, one in zip((0, 1), both, strict=True):
        alone = dp.attribute(trace, Heads(layer), 5)
        assert one.labels == alone.labels and torch.allclose(one.scores, alone.scores, atol=1e-12)


def test_what_does_not_know_them_refuses(dp):
    with pytest.raises(ValueError, match="a graph does not know .* experts ahead of their layer"):
        dp.graph(IDS, 5)
    with pytest.raises(ValueError, match="attention's own book is for models .* experts ahead of their layer"):
        dp.explain_attention(IDS, Tokens(), 0)
