"""Zamba: a block that hands what it gives to the Mamba behind it, and reads the first embedding beside the stream."""

from __future__ import annotations

import pytest
import torch

from depass_fast import DePass, Heads, Modules, Neurons, Tokens
from depass_fast.adapters.recurrent import knows_recurrences
from tests.support.family_models import build_variant
from tests.support.models import random_ids

pytestmark = pytest.mark.skipif(not knows_recurrences(), reason="the installed transformers is too old")

IDS = random_ids(8)


@pytest.fixture(scope="module", params=["zamba2", "zamba"])
def dp(request) -> DePass:
    return DePass(build_variant(request.param).double(), progress=False)


@pytest.fixture(scope="module")
def trace(dp):
    return dp.trace(IDS)


def test_the_streams_of_a_trace_are_those_of_the_model(dp, trace):
    """x is what a module is called with, e the embedding everywhere, and t what the projection behind a block gives."""
    seen: dict[str, list[torch.Tensor]] = {"x": [], "t": []}
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen["x"].append(args[0][0].clone()))
        for block in dp.adapter.blocks
    ]
    hooks += [
        block.linear.register_forward_hook(lambda _, args, output: seen["t"].append(output[0].clone()))
        for block in dp.adapter.blocks
        if hasattr(block, "linear")
    ]
    with torch.no_grad():
        dp.model(torch.tensor([IDS]))
    for hook in hooks:
        hook.remove()
    streams = [trace.resid(index).chunk(3, 1) for index in range(6)]
    assert dp.adapter.n_layers == 5 and [dp.adapter.home(index) for index in range(5)] == [0, 0, 1, 2, 2]
    embedded = dp.adapter.embedding(torch.tensor(IDS))
    for index, (x, e, t) in enumerate(streams):
        assert torch.equal(e, embedded)
        if index < 5:
            assert torch.allclose(x, seen["x"][dp.adapter.home(index)], atol=1e-5)
        behind = index in (1, 4)  # a Mamba with a block in front of it
        assert torch.allclose(t, seen["t"][index // 4], atol=1e-5) if behind else not t.any()
    assert torch.allclose(trace.before_norm, streams[5][0])


def test_what_a_block_gives_goes_to_the_mixer_alone(dp, trace):
    """Behind the mixer nothing is left of the third stream, and a head's part of the first is the mixer's."""
    heads, after = dp.start(trace, Heads(0)), dp.decompose(trace, Heads(0), end=1)
    named = [label for label in heads.labels if label.startswith("L0H")]
    assert heads.dense()[:, [heads.labels.index(label) for label in named], :64].abs().max() == 0
    assert after.dense()[:, [after.labels.index(label) for label in named], :64].abs().max() == 0
    behind = dp.decompose(trace, Heads(0), end=2).dense()
    assert not behind[..., 64:].any() and behind[:, after.labels.index("L0H1"), :32].any()


def test_rounding_is_no_component_of_a_stream_that_heads_fill(dp, trace):
    """Heads of a block are all that its MLP reads: what rounding leaves would get shares of neurons, as `rest`."""
    state = dp.start(trace, Heads(0))
    rest = state.dense()[:, state.labels.index("rest")]
    assert rest[:, :64].any() and not rest[:, 64:].any()
    written = dp.decompose(trace, Heads(0), end=1)
    assert not written.dense()[:, written.labels.index("rest"), 64:].any() and written.completeness_error < 1e-12


def test_verified_streamed_in_focus_and_saved(dp, trace, tmp_path):
    for kind in (Tokens(), Heads(0), Heads(1)):
        whole = dp.attribute(trace, kind, 5, verify=True)
        assert whole.verification.passed and whole.verification.error < 1e-12
        streamed = dp.attribute(trace, kind, 5, stream=True, memory_budget=2000)
        assert torch.allclose(streamed.scores, whole.scores, rtol=0, atol=1e-12)
    focus, whole = dp.focus(trace, Neurons(0), [3, 7]), dp.decompose(trace, Neurons(0), end=4)
    places = [whole.labels.index(label) for label in focus.labels]
    states = focus.states[list(focus.layers).index(4)].squeeze()
    assert torch.allclose(states, whole.dense()[:, places], rtol=0, atol=1e-12)
    book = dp.ledger(IDS, 5)
    book.save(tmp_path / "book")
    again = dp.load_ledger(tmp_path / "book")
    for kind in (Tokens(1), Heads(3), Heads(4), Modules(0, "attention"), Modules(3), Neurons(3)):
        exact = dp.attribute(trace, kind, 5, allocation=book.rule, method="exact")
        assert again.scores(kind).labels == exact.labels
        assert torch.allclose(again.scores(kind).scores, exact.scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize("what", ["t is halved", "t goes on", "e is another one"])
def test_a_fork_that_passes_on_something_else_is_refused(what):
    model = build_variant("zamba2")
    block = model.model.layers[2]

    def forward(x, e, layer_idx, mask, causal_mask, **kwargs):
        given = e * 1.1 if what == "e is another one" else e
        given = block.shared_transformer(x, given, layer_idx, causal_mask, **kwargs)
        t = block.linear(given) * (0.5 if what == "t is halved" else 1.0)
        out = block.mamba_decoder(x, transformer_hidden_states=t, attention_mask=mask, **kwargs)
        return out + t if what == "t goes on" else out

    block.forward = forward
    with pytest.raises(RuntimeError, match="layer [34]: .* of the residual streams|what the residual streams gain"):
        DePass(model, progress=False).trace(IDS)
