"""The measured maps between projections and attention: what they are, and that the model is handed back."""

import sys

import pytest
import torch

from depass_fast import DePass, Tokens
from depass_fast.looking import turned
from depass_fast.looking.freeze import freeze_sides
from depass_fast.trace.consistency import computation
from depass_fast.trace.turns import _is_alike, measure_turns
from tests.support.ahead_models import AHEAD
from tests.support.family_models import FIRST, VARIANTS, available, build_variant
from tests.support.gemma_models import GEMMAS
from tests.support.models import build, random_ids, runs
from tests.support.recurrent_models import RECURRENT

IDS = torch.tensor(random_ids(9))
GIVEN = [name for name in VARIANTS if available(name) and name not in {*RECURRENT, *GEMMAS, *AHEAD}]


def by_hand(module, x):
    """Llama's rotary embedding of ``x`` (1, H, N, d)."""
    cos, sin = module.model.rotary_emb(x, torch.arange(x.shape[2])[None])
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]


def test_it_is_the_rotary_embedding():
    dp = build("llama-gqa")
    found = measure_turns(dp.adapter, IDS, [1])[1]
    x = torch.randn(len(IDS), 4, 8)
    wanted = by_hand(dp.model, x.transpose(0, 1)[None])[0].transpose(0, 1)
    for turn in found:
        assert torch.allclose(turn.apply(x, slice(None)), wanted, atol=1e-6)


def test_without_positions_it_is_the_identity():
    dp = DePass(build_variant("gpt2"))
    x = torch.randn(len(IDS), 4, 8)
    for turn in measure_turns(dp.adapter, IDS, [0])[0]:
        assert torch.equal(turn.apply(x, slice(None)), x)


@pytest.mark.skipif(not available("smollm3"), reason="not in this version of transformers")
def test_layers_may_differ():
    found = measure_turns(DePass(build_variant("smollm3")).adapter, IDS, range(3))  # the second has no embedding
    x = torch.randn(len(IDS), 4, 8)
    assert torch.equal(found[1].q.apply(x, slice(None)), x)
    assert not torch.allclose(found[0].q.apply(x, slice(None)), x)


def test_layers_are_told_apart_by_little():
    first, other = (measure_turns(DePass(build_variant("llama: GQA")).adapter, IDS, [0])[0] for _ in range(2))
    vector = torch.rand(1, 8) + 0.5
    made = first.q.apply(vector.expand(len(IDS), 1, -1), slice(None))[:, 0]
    assert _is_alike(other.q, vector, made)
    made[4, 3] += 1e-4
    assert not _is_alike(other.q, vector, made)
    assert not _is_alike(other.q, vector, made[:-1])


def test_a_model_is_asked_once(monkeypatch):
    dp, asked = DePass(build_variant("llama: GQA")), []
    monkeypatch.setattr(turned, "measure_turns", lambda *given: asked.append(given[2]) or measure_turns(*given))
    first = dp.explain_attention(IDS, Tokens(), 1)
    dp.explain_attention(IDS[:4], Tokens(), 1)
    dp.attention_credit(IDS, Tokens(), 3)
    assert asked == [[1], [0, 2]]  # of a layer that is known nothing is asked
    dp.explain_attention(random_ids(12), Tokens(), 1)
    assert asked == [[1], [0, 2], [1]]  # but of a longer prompt
    dp.model.model.rotary_emb.inv_freq.mul_(0.5)
    again = dp.explain_attention(IDS, Tokens(), 1)
    assert asked[3:] == [[1]] and not torch.allclose(first.scores, again.scores, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(name, torch.float32, marks=pytest.mark.once_a_family) for name in GIVEN]
    + [pytest.param(name, torch.bfloat16, marks=pytest.mark.once_a_file) for name in GIVEN if name in FIRST],
    ids=str,
)
@torch.no_grad()
def test_queries_and_keys_are_the_models(name, dtype):
    model = build_variant(name).to(dtype)
    if not runs(model):
        pytest.skip(f"transformers does not run it in {dtype}")
    dp = DePass(model)
    turns, trace = measure_turns(dp.adapter, IDS, range(dp.adapter.n_layers)), dp.trace(IDS)
    for index, layer in enumerate(trace.layers):
        sides = freeze_sides(dp.adapter, index, layer.attention, trace.span(0), turns[index], torch.float32)
        assert sides.off <= (1e-6 if dtype == torch.float32 else 0.02)
        for side, own in ((sides.of_q, sides.q), (sides.of_k, sides.k)):
            rows, y = torch.randn(len(IDS), dp.adapter.hidden_size), torch.randn_like(own)
            there, back = (side.read(rows, slice(None)) * y).sum(), side.back(y)
            assert torch.allclose(there, (rows * back).sum(), rtol=1e-3, atol=1e-3)
            assert (side.back(y, slice(0, side.heads)).sum(0) - back).norm() <= 1e-5 * back.norm()


@pytest.mark.parametrize("name", ["llama: GQA", "gptj", "deepseek_v2", "phi: QK norms"])
def test_the_model_is_handed_back(name):
    if not available(name):
        pytest.skip("not in this version of transformers")
    dp = DePass(build_variant(name))
    before, implementation = computation(dp.model), dp.adapter.config._attn_implementation
    logits = dp.model(IDS[None]).logits
    measure_turns(dp.adapter, IDS, [0, 2])
    assert computation(dp.model) == before and dp.adapter.config._attn_implementation == implementation
    assert torch.equal(dp.model(IDS[None]).logits, logits)


def test_it_is_handed_back_after_an_error(monkeypatch):
    dp = DePass(build_variant("llama: GQA"))
    before, implementation = computation(dp.model), dp.adapter.config._attn_implementation
    monkeypatch.setattr("depass_fast.trace.turns._Question._turn", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_turns(dp.adapter, IDS, [0])
    assert computation(dp.model) == before and dp.adapter.config._attn_implementation == implementation


def test_a_map_that_mixes_more_is_refused(monkeypatch):
    dp = DePass(build_variant("llama: GQA"))
    home = sys.modules[type(dp.model.model.layers[0].self_attn).__module__]
    monkeypatch.setattr(home, "apply_rotary_pos_emb", lambda q, k, *_: (q.cumsum(-1), k))
    with pytest.raises(ValueError, match="mixes more than two dimensions"):
        measure_turns(dp.adapter, IDS, [0])


def test_queries_of_another_kind_are_refused():
    dp = DePass(build_variant("llama: GQA"))
    dp.model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(ValueError, match="the queries of layer 1 are not what the family 'llama' declares"):
        dp.explain_attention(IDS, Tokens(), 1)
