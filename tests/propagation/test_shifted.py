"""RWKV-4: branches that read two positions, a model that halves its stream, and what of the library knows neither."""

from __future__ import annotations

import copy

import pytest
import torch

from depass_fast import DePass, Heads, Modules, Neurons, Tokens
from depass_fast.adapters.maps import Norm
from depass_fast.adapters.recurrent import knows_recurrences
from depass_fast.adapters.shift import Shift
from depass_fast.propagation import shifted
from depass_fast.propagation.joint import can_propagate_jointly
from tests.support.beyond import check_refused_by_name
from tests.support.family_models import build_variant
from tests.support.models import random_ids

pytestmark = pytest.mark.skipif(not knows_recurrences(), reason="the installed transformers is too old")

IDS = random_ids(8)


@pytest.fixture(scope="module")
def dp() -> DePass:
    return DePass(build_variant("rwkv").double(), progress=False)


@pytest.fixture(scope="module")
def trace(dp):
    return dp.trace(IDS)


def test_the_way_back_is_the_transpose():
    """⟨Ax, y⟩ = ⟨x, Aᵀy⟩ within prompts, with constants left out; the norm's scale stays that of ``resid``."""
    torch.manual_seed(0)
    resid, x, y = torch.randn(3, 9, 6, dtype=torch.float64)
    norm = Norm(torch.randn(6).double(), 1e-5, torch.randn(6).double(), centred=True)
    shift, lengths = Shift(norm, torch.rand(6).double()), [5, 1, 3]
    there = shift.mixed(norm.apply(x, norm.scale(resid)), lengths)
    assert torch.allclose((there * y).sum(), (x * shift.back(y[None], resid, lengths)[0]).sum())
    whole = shift.of(resid, lengths) - shift.constant(lengths, resid)
    assert torch.allclose(whole, shift.mixed(norm.apply(resid, norm.scale(resid)), lengths))


@torch.no_grad()
@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
def test_components_are_mixed_as_the_whole_is(dp, trace, at_once, monkeypatch):
    """Jagged rows, a few at a time, at all positions and at some, make up what was recorded."""
    monkeypatch.setitem(shifted.AT_ONCE, True, at_once)
    state = dp.decompose(trace, Tokens(), end=1)
    front, record = dp.adapter.attention(1).front, trace.layers[1]
    whole = shifted.read_shifted(state, front, record.resid_pre)
    assert torch.allclose(whole.total(), record.attention.resid, atol=1e-12)
    few = state.layout.at(trace.offsets, [torch.tensor([0, 3, 7]).numpy()])
    some = shifted.read_shifted(state, front, record.resid_pre, few)
    assert torch.equal(some.dense(), whole.dense()[[0, 3, 7]])
    token = whole.labels.index(dp.attribute(trace, Tokens()).labels[2])
    assert whole.dense()[2, token].any() and not whole.dense()[:2, token].any()


def test_streamed_verified_and_all_layers(dp, trace, tmp_path):
    assert not can_propagate_jointly(trace, dp.options.build(dp.adapter))
    whole = dp.attribute(trace, Tokens(), 5, verify=True)
    assert whole.verification.passed and float(whole.verification.error) < 1e-12
    for position in (0, 4):
        read = dp.attribute(trace, Neurons(0), 5, position=position)
        assert read.completeness_error < 1e-12
    streamed = dp.attribute(trace, Tokens(), 5, stream=True)
    assert torch.allclose(streamed.scores, whole.scores, rtol=0, atol=1e-12)
    every = dp.attribute(trace, Modules(layers="all"), 5)
    assert torch.allclose(every[2].scores, dp.attribute(trace, Modules(2), 5).scores, rtol=0, atol=1e-12)
    few, among = dp.focus(trace, Neurons(0), [3, 7]), dp.decompose(trace, Neurons(0), end=3)
    assert torch.allclose(few.states[-1], among.dense()[:, [3, 7]], rtol=0, atol=1e-12)  # by themselves
    book = dp.ledger(IDS, 5)
    book.save(tmp_path / "book")
    again = dp.load_ledger(tmp_path / "book")
    for kind in (Tokens(2), Heads(1), Modules(1), Modules(0, "attention"), Neurons(1)):
        exact = dp.attribute(trace, kind, 5, allocation=book.rule, method="exact")
        assert again.scores(kind).labels == exact.labels
        assert torch.allclose(again.scores(kind).scores, exact.scores, rtol=0, atol=1e-12)


def test_a_model_that_has_not_run_yet_is_the_same():
    """It halves its weights in its first forward pass, which a trace may be; without that it is another config."""
    fresh = build_variant("rwkv").double()
    ran = copy.deepcopy(fresh)
    with torch.no_grad():
        logits = ran(torch.tensor([IDS])).logits[0, -1]
    assert not fresh.rwkv.layers_are_rescaled and ran.rwkv.layers_are_rescaled
    one, other = (DePass(model).attribute(IDS, Tokens(), 5) for model in (fresh, ran))
    assert torch.equal(one.scores, other.scores)
    assert float(one.scores.sum()) == pytest.approx(float(logits[5]), rel=1e-5)  # which is computed in float32
    never = copy.deepcopy(ran.config)
    never.rescale_every = 0
    whole = type(ran)(never).double().eval()
    whole.load_state_dict(build_variant("rwkv").double().state_dict())
    result = DePass(whole).attribute(IDS, Tokens(), 5)
    assert torch.allclose(result.scores, one.scores, rtol=0, atol=1e-3 * float(one.scores.abs().max()))  # ε halves not


def test_what_knows_one_position_alone_says_so(dp):
    check_refused_by_name(dp, IDS, "what branches read of the position before")
