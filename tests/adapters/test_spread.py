"""Convolutions behind branches (Inkling): what they carry, the way back, what is checked, and the vocabulary's end."""

import pytest
import torch

from depass_fast import DePass, Heads, LogProb, Modules, Neurons, Tokens
from depass_fast.adapters.spread import Spread
from tests.support.family_models import available, build_variant
from tests.support.models import random_ids

pytestmark = pytest.mark.skipif(not available("inkling_text"), reason="not in this version of transformers")

IDS = random_ids(8)


@pytest.fixture(scope="module")
def dp() -> DePass:
    return DePass(build_variant("inkling_text").double(), progress=False)


def test_the_way_back_is_the_transpose_and_keeps_to_the_prompts_edges(dp):
    spread, random = Spread(dp.adapter.block(0).attn_sconv), torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, 7, 32, generator=random, dtype=torch.float64).unbind()
    forward = torch.cat([spread.along(part) for part in x[0].split([2, 5])])
    offsets = torch.tensor([0, 2, 7]).numpy()
    assert float((forward * y[0]).sum()) == pytest.approx(float((x * spread.back(y, offsets)).sum()), rel=1e-12)
    own = dp.adapter.block(0).attn_sconv.double()(x[:, 2:])[0]
    assert torch.allclose(forward[2:], own.double(), rtol=0, atol=1e-6)


def test_a_neuron_reaches_as_many_later_positions_as_there_are_taps(dp):
    trace = dp.trace(IDS)
    act, state = trace.layers[0].mlp.act, dp.start(trace, Neurons(0)).dense()
    weight = dp.adapter.mlps(0)[0].w_down[:, 3] * dp.adapter.block(0).mlp.global_scale
    taps = Spread(dp.adapter.block(0).mlp_sconv).taps
    assert len(taps) == 3
    wanted = sum(act[5 - back, 3] * taps[back] * weight for back in range(3))
    assert torch.allclose(state[5, 3], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("position", [3, -1])
def test_a_ledger_gives_the_scores_of_every_kind(dp, position):
    book = dp.ledger(IDS, LogProb(5), rule="shapley", position=position)
    for kind in (Tokens(), Heads(0), Modules(1), Neurons(2), Heads(2)):
        exact = dp.attribute(IDS, kind, LogProb(5), allocation="shapley", method="exact", position=position)
        found = book.scores(kind)
        assert found.labels == exact.labels and torch.allclose(found.scores, exact.scores, rtol=0, atol=1e-12)


def test_other_code_is_refused_and_graphs_do_not_know_it(dp):
    with pytest.raises(ValueError, match="a graph does not know all .* convolutions behind branches"):
        dp.graph(IDS, 5)
    with pytest.raises(ValueError, match="id 63 is outside the vocabulary"):
        dp.attribute(IDS, Tokens(), 63)
    model = build_variant("inkling_text")
    conv = model.model.layers[1].mlp_sconv
    forward = conv.forward
    conv.forward = lambda *args, **kwargs: 1.1 * forward(*args, **kwargs)
    with pytest.raises(RuntimeError, match="layer 1: .*mlp and the convolution behind it write something else"):
        DePass(model).attribute(IDS, Tokens(), 5)
