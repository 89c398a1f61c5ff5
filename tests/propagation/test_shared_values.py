"""Layers of Gemma 4: values of an earlier layer, gates of the token's embedding, experts beside an MLP."""

from __future__ import annotations

import pytest
import torch

from depass_fast import DePass, Heads, Neurons, Subspaces, Tokens
from depass_fast.adapters.recurrent import knows_recurrences
from depass_fast.compat import decomposed_state_manager
from depass_fast.components.base import Entry
from depass_fast.linear_rules import linear_shares
from depass_fast.planning.planner import JOINT_BYTES
from depass_fast.propagation.joint import can_propagate_jointly
from depass_fast.propagation.layer import through_attention
from depass_fast.trace.record import MlpTrace
from tests.support.family_models import build_variant
from tests.support.models import random_ids

pytestmark = pytest.mark.skipif(not knows_recurrences(), reason="the installed transformers is too old")

SHARED, EXPERTS = "gemma4_text: shared values, embeddings", "gemma4_text: experts, embeddings, shared values"
IDS = random_ids(8)
# layers 3 and 4 of the first read what entered layers 2 and 1
SOURCES = {3: 2, 4: 1}


@pytest.fixture(scope="module")
def dp() -> DePass:
    return DePass(build_variant(SHARED))


@pytest.fixture(scope="module")
def trace(dp):
    return dp.trace(IDS)


def test_values_are_those_of_the_layer_that_has_them(dp, trace):
    for layer, record in enumerate(trace.layers):
        source = SOURCES.get(layer)
        assert record.attention.source == source
        assert record.attention.resid is trace.layers[layer if source is None else source].resid_pre
        if source is not None:
            given = trace.layers[source].attention
            assert record.attention.k is given.k and record.attention.head_scales is given.head_scales


def test_what_started_behind_the_values_gets_none_of_them(dp, trace):
    """All that such attention writes is a constant of the components' way: it goes to `bias`, at every position."""
    written = trace.layers[4].resid_mid - trace.layers[4].resid_pre
    state = dp.start(trace, Heads(2))  # behind the values of both
    carried = dp.carry(trace, state, 4)
    before = carried.dense().clone()
    layer, record = dp.adapter.layer(4), trace.layers[4]
    after, _ = through_attention(carried, layer, record, dp.options.build(dp.adapter))
    gained = after.dense() - before
    bias = after.labels.index("bias")
    assert torch.equal(gained[:, :bias], torch.zeros_like(gained[:, :bias]))
    assert torch.allclose(gained[:, bias], written, atol=1e-6) and written.norm() > 1


def test_no_token_but_the_one_that_is_read_counts_behind_the_last_values(dp, trace):
    """Behind the last layer with keys and values of its own no position hears of another one any more."""
    scores = dp.attribute(trace, Tokens(3), 5)
    named = dict(zip(scores.labels, scores.scores.tolist(), strict=True))
    others = [score for label, score in named.items() if label not in ("bias", scores.labels[len(IDS) - 1])]
    assert others == [0.0] * (len(IDS) - 1) and named["bias"] != 0
    assert "bias" not in dp.attribute(trace, Tokens(1), 5).labels


@pytest.mark.parametrize("kind", [Tokens(), Tokens(2), Heads(1), Neurons(2)], ids=str)
def test_states_take_along_what_later_layers_read(dp, trace, kind):
    state = dp.start(trace, kind)
    for end in range(state.layer + 1, 5):
        state = dp.carry(trace, state, end)
        began = kind.entry(dp.adapter).order
        waiting = {Entry(s, "resid_pre") for layer, s in SOURCES.items() if began <= 2 * s and s < end <= layer}
        assert set(state.earlier or {}) == waiting
    whole, last = dp.decompose(trace, kind), dp.carry(trace, state, None)
    assert not last.earlier and not whole.earlier
    assert torch.allclose(last.dense(), whole.dense(), rtol=0, atol=1e-5 * float(whole.dense().abs().max()))


@pytest.mark.parametrize("name", [SHARED, EXPERTS])
@pytest.mark.parametrize("options", [{}, {"stream": True}, {"memory_budget": 3000}, {"backend": "reference"}], ids=str)
def test_every_step_is_the_references(name, options):
    dp = DePass(build_variant(name, seed=3))
    found = dp.attribute([IDS, IDS[:3]], Heads(0), 7, verify=True, **options)
    for one in found:
        assert one.verification.passed and one.completeness_error <= 1e-5


def test_a_few_components_alone(dp, trace):
    whole = dp.attribute(trace, Tokens(), 5)
    known = dp.partition(trace, Tokens())
    state = dp.focus(trace, Tokens(), [2, 5], partition=known)
    expected = dp.decompose(trace, Tokens(), end=4).dense()[:, [2, 5]]
    assert torch.allclose(state.states[4], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert whole.completeness_error <= 1e-5


def test_they_are_carried_one_by_one_and_their_copies_are_planned_for(dp, trace):
    assert not can_propagate_jointly(trace, dp.options.build(dp.adapter))
    plain = DePass(build_variant("gemma4_text: keys are values"))
    assert can_propagate_jointly(plain.trace(IDS), plain.options.build(plain.adapter))
    both, one, none = (dp.plan(trace, Subspaces(layer, [torch.eye(32)[:, :3]])) for layer in (1, 2, 3))
    copies = [plan.of("torch").peak_bytes // plan.state_bytes for plan in (both, one, none)]
    assert copies[0] > copies[1] > copies[2] and both.state_bytes < JOINT_BYTES


@pytest.mark.parametrize("name", [SHARED, EXPERTS])
def test_a_gate_is_shared_out_by_what_drives_it(name):
    """The token's embedding is frozen: all linear rules give a gate's neurons to what the gate reads."""
    dp = DePass(build_variant(name).double())
    trace = dp.trace(IDS)
    for layer, weights in ((record, dp.adapter.mlps(index)[-1]) for index, record in enumerate(trace.layers)):
        gate = layer.mlps[-1]
        assert weights.name == "embed" and weights.up is None and gate.factor.shape == gate.act.shape == (8, 6)
        assert torch.allclose(weights.activation(gate.gate) * gate.factor, gate.act, rtol=0, atol=1e-14)
        made = [
            linear_shares(rule, weights, gate, slice(None), torch.float64) for rule in ("taylor", "half", "shapley")
        ]
        assert all(one.up is None and one.constant is None for one in made)
        assert all(torch.allclose(one.gate, made[0].gate, rtol=0, atol=1e-12) for one in made)
        zero = torch.zeros_like(gate.gate)  # the limit of the ratio is the slope there, times the embedding
        silent = MlpTrace(gate.resid, zero, zero, factor=gate.factor)
        shares = linear_shares("shapley", weights, silent, slice(None), torch.float64)
        assert torch.allclose(shares.gate, 0.5 * gate.factor, rtol=0, atol=1e-6)


def test_what_is_for_plain_layers_refuses_it(dp):
    with pytest.raises(ValueError, match="values of an earlier layer"):
        dp.attribute(IDS, Heads(0), 5, method="adjoint")
    with pytest.raises(ValueError, match="attention's own book"):
        dp.explain_attention(IDS, Tokens(), 0)
    with pytest.raises(ValueError, match="the published interface"):
        decomposed_state_manager(dp.model, None)


def test_it_must_not_look_ahead():
    model = build_variant(SHARED)
    model.config.use_bidirectional_attention = "all"
    with pytest.raises(ValueError, match="looks ahead"):
        DePass(model)
