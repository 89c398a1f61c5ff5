"""Several residual streams: frozen maps that read, mix and write them, and what of the library does not know them."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from depass_fast import DePass, Heads, Modules, Neurons, Subspaces, Tokens
from depass_fast.adapters.activation import Activation
from depass_fast.adapters.recurrent import knows_recurrences
from depass_fast.adapters.streams import StreamEnd, StreamStep
from depass_fast.linear_rules import _cut_off
from depass_fast.propagation.joint import can_propagate_jointly
from tests.support.beyond import check_refused_by_name
from tests.support.family_models import build_model, build_variant
from tests.support.gemma_models import GEMMAS
from tests.support.models import random_ids

pytestmark = pytest.mark.skipif(not knows_recurrences(), reason="the installed transformers is too old")

NAME = "gemma3n_text"
IDS = random_ids(8)


@pytest.fixture(scope="module")
def dp() -> DePass:
    return DePass(build_variant(NAME).double(), progress=False)


@pytest.fixture(scope="module")
def trace(dp):
    return dp.trace(IDS)


def test_ways_back_are_transposes():
    """⟨Ax, y⟩ = ⟨x, Aᵀy⟩ for all that reads, passes and writes, and for the end."""
    torch.manual_seed(0)
    d, n, m, t = 5, 3, 4, 6
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    step = StreamStep(draw(t, n), draw(t, m, n), draw(t, m))
    two = StreamStep(draw(t, 2, n, 1), None, draw(t, n))  # which reads two sums side by side
    x, y, wide, both = draw(t, n * d), draw(t, d), draw(t, m * d), draw(t, 2 * d)
    end = StreamEnd(draw(t, n), (None, draw(d, d), draw(d, d)))
    pairs = [
        (step.reads(x), y, x, step.reads_back(y)),
        (two.reads(x), both, x, two.reads_back(both)),
        (step.passes(x), wide, x, step.passes_back(wide)),
        (step.writes(y), wide, y, step.writes_back(wide)),
        (end.of(x), y, x, end.back(y, torch.arange(t))),
    ]
    for there, of, given, back in pairs:
        assert torch.allclose((there * of).sum(), (given * back).sum())
    assert torch.allclose(step.mixed(x[:, None])[:, 0], step.passes(x))
    each = [StreamStep(one, None, two.write).reads(x) for one in two.read[..., 0].unbind(1)]
    assert torch.allclose(two.reads(x), torch.cat(each, 1))
    assert torch.allclose(step.at(torch.tensor([4, 1])).reads(x[[4, 1]]), step.reads(x)[[4, 1]])


def test_the_streams_of_a_trace_are_those_of_the_model(dp, trace):
    """The trace holds what every layer was called with, and what the final norm was given."""
    seen: list[torch.Tensor] = []
    ends: list[torch.Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())) for block in dp.adapter.blocks
    ]
    norm = dp.adapter.final_norm_module
    hooks.append(norm.register_forward_pre_hook(lambda _, args: ends.append(args[0].clone())))
    with torch.no_grad():
        dp.model(torch.tensor([IDS]))
    for hook in hooks:
        hook.remove()
    for index, streams in enumerate(seen):
        assert torch.allclose(trace.resid(index).unflatten(-1, (4, -1)), streams[:, 0].transpose(0, 1), atol=1e-5)
        assert trace.layers[index].resid_mid.shape == (len(IDS), 5 * 32)
    assert trace.resid_final.shape == (len(IDS), 4 * 32) and torch.allclose(trace.before_norm, ends[0][0], atol=1e-5)


def test_what_started_behind_shared_values_gets_none_of_them(dp, trace):
    """Layers 3 and 4 take what layers 2 and 1 made: for heads of layer 2 they write constants, which are `bias`'s."""
    state = dp.decompose(trace, Heads(2))
    assert "bias" in state.labels and state.completeness_error < 1e-12
    early = dp.decompose(trace, Tokens())
    assert "bias" not in early.labels and early.completeness_error < 1e-12


def test_streamed_verified_together_and_saved(dp, trace, tmp_path):
    assert not can_propagate_jointly(trace, dp.options.build(dp.adapter))
    whole = dp.attribute(trace, Tokens(), 5, verify=True)
    assert whole.verification.passed and float(whole.verification.error) < 1e-12
    streamed = dp.attribute(trace, Tokens(), 5, stream=True)
    assert torch.allclose(streamed.scores, whole.scores, rtol=0, atol=1e-12)
    every = dp.attribute(trace, Modules(layers="all"), 5)
    assert torch.allclose(every[3].scores, dp.attribute(trace, Modules(3), 5).scores, rtol=0, atol=1e-12)
    book = dp.ledger(IDS, 5)
    book.save(tmp_path / "book")
    again = dp.load_ledger(tmp_path / "book")
    for kind in (Tokens(2), Heads(3), Modules(1), Modules(0, "attention"), Neurons(3)):
        exact = dp.attribute(trace, kind, 5, allocation=book.rule, method="exact")
        assert again.scores(kind).labels == exact.labels
        assert torch.allclose(again.scores(kind).scores, exact.scores, rtol=0, atol=1e-12)


def test_widths_are_those_of_all_streams(dp, trace):
    with pytest.raises(ValueError, match=r"expected shape \(128, k\)"):
        dp.attribute(trace, Subspaces(1, [torch.eye(32)[:, :3]]), 5)
    direction = torch.randn(128, dtype=torch.float64)
    scores = dp.attribute(trace, Tokens(), direction, end=2).scores
    assert torch.allclose(scores.sum(), trace.resid(2)[-1] @ direction)
    with pytest.raises(ValueError, match=r"a direction must have shape \(32,\)"):
        dp.attribute(trace, Tokens(), direction)


def test_what_knows_one_stream_alone_says_so(dp):
    check_refused_by_name(dp, IDS, "several residual streams")


def test_a_fork_that_mixes_otherwise_is_refused():
    model = build_variant(NAME)

    def correct(self, predictions, activated):
        return type(self).correct(self, predictions, activated) * 1.01

    altup = model.model.layers[1].altup
    altup.correct = types.MethodType(correct, altup)
    with pytest.raises(RuntimeError, match="layer 1: .*mlp .* of the residual streams"):
        DePass(model, progress=False).trace(IDS)


@pytest.mark.parametrize("shift", [1.0, -3.0])  # thresholds above and below zero
def test_a_threshold_moves_the_mean_of_the_activation(shift):
    """B of `shapley` and the parts of `half`, with the threshold frozen, by a sum over many points."""
    torch.manual_seed(1)
    gate, up = torch.randn(3, 40, dtype=torch.float64) + shift, torch.randn(3, 40, dtype=torch.float64)
    activation = Activation(nn.GELU(approximate="tanh"), sparsity=0.6)
    cut = activation.threshold(gate)
    assert bool((cut > 0).all()) == (shift > 0)
    act = activation(gate, up)
    t = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    mean = activation.curve(torch.relu(t[:, None, None] * gate - cut)).mean(0)
    of_gate, of_up, constant = _cut_off("shapley", activation, gate, act, up, 1.0)
    assert constant is None and torch.allclose(of_up, mean, atol=1e-6)
    assert torch.allclose(of_gate * gate + of_up * up, act)
    of_gate, of_up, constant = _cut_off("half", activation, gate, act, up, 1.0)
    assert torch.allclose(of_gate * gate + of_up * up + constant, act)
    assert torch.allclose(constant, torch.zeros_like(up)) == (shift > 0)


def test_a_model_that_sees_and_hears_is_decomposed_on_text(monkeypatch):
    """Its towers need timm, which is not installed: here they are nothing."""
    from transformers.models.gemma3n import modeling_gemma3n

    made = modeling_gemma3n.AutoModel.from_config

    def from_config(config, *args, **kwargs):
        return made(config, *args, **kwargs) if "Text" in type(config).__name__ else nn.Identity()

    monkeypatch.setattr(modeling_gemma3n.AutoModel, "from_config", from_config)
    _, changes = GEMMAS["gemma3n_text: MHA, biases, three streams"]
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = build_model("gemma3n", text_config={**shape, "vocab_size": 64, **changes})
    dp = DePass(model, progress=False)
    with torch.no_grad():
        own = model(torch.tensor([IDS])).logits[0]
    assert torch.allclose(dp.adapter.logits(dp.trace(IDS).normed_final), own, atol=1e-5)
    assert dp.attribute(IDS, Tokens(), 5).completeness_error < 1e-5
