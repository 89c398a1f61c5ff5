"""Qwen 4: streams that are read by channel, keys selected in a mask, and embeddings that enter the streams later."""

from __future__ import annotations

import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from depass_fast import DePass, Heads, Modules, Neurons, Tokens
from depass_fast.adapters.streams import LayerStreams, StreamEnd, StreamStep
from depass_fast.adapters.unsupported import REASONS
from depass_fast.components.chosen import empty_part
from depass_fast.propagation.streams import through_mlps
from depass_fast.state.layout import Components
from depass_fast.trace.attention import attention_probabilities
from depass_fast.trace.selection import seen_in
from tests.support.family_models import available, build_variant
from tests.support.models import random_ids

NAME = "qwen4_exp_text"
IDS = random_ids(9)
pytestmark = pytest.mark.skipif(not available(NAME), reason="the installed transformers is too old")


def model(implementation: str = "sdpa"):
    """Its embeddings of several tokens enter in front of layers 0 and 2; their convolution starts out as zeros."""
    made = build_variant(NAME, implementation=implementation)
    torch.manual_seed(5)
    for layer in (0, 2):
        torch.nn.init.normal_(made.model.layers[layer].ple.conv1d.weight)
    return made


@pytest.fixture(scope="module")
def dp() -> DePass:
    return DePass(model().double(), progress=False)


@pytest.fixture(scope="module")
def trace(dp):
    return dp.trace(IDS)


@pytest.fixture(scope="module")
def plain() -> DePass:
    return DePass(model("eager"), progress=False)


def test_ways_back_by_channel_are_transposes():
    torch.manual_seed(0)
    d, n, t = 5, 3, 6
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    step, end = StreamStep(draw(t, n, d), None, draw(t, n)), StreamEnd(draw(t, n, d), (None, draw(d, d), None))
    x, y, some = draw(t, n * d), draw(t, d), torch.tensor([4, 1])
    for there, back in ((step.reads(x), step.reads_back(y)), (end.of(x), end.back(y, torch.arange(t)))):
        assert torch.allclose((there * y).sum(), (x * back).sum())
    assert torch.allclose(step.at(some).reads(x[some]), step.reads(x)[some])
    assert torch.allclose(end.of(x[some], some), end.of(x)[some])


@torch.no_grad()
def test_the_streams_are_the_models_own(plain):
    """A layer's are those behind its own embeddings; what is read at the end is what the unembedding reads."""
    trace, seen, hooks, decoder = plain.trace(IDS), {}, [], plain.model.model

    def note(index):
        return lambda module, args, output: seen.update({index: (args[0][0].clone(), output[0][0].clone())})

    for index, layer in enumerate(decoder.layers):
        hooks.append(layer.attn_hyper_connection.register_forward_hook(note(index)))
    mixer = decoder.hyper_connection_mixer
    hooks.append(mixer.register_forward_hook(lambda module, args, output: seen.update(end=(args[0][0], output[0]))))
    plain.model(torch.tensor([IDS]))
    for hook in hooks:
        hook.remove()
    for index, layer in enumerate(trace.layers):
        assert torch.allclose(layer.resid_pre, seen[index][0], atol=1e-5)
        assert torch.allclose(layer.streams.attention.reads(layer.resid_pre), seen[index][1], atol=1e-5)
    assert torch.allclose(trace.resid_final, seen["end"][0], atol=1e-5)
    assert torch.allclose(trace.normed_final, seen["end"][1], atol=1e-5) and trace.normed_final.shape == (9, 32)


@torch.no_grad()
def test_keys_are_those_of_the_mask(plain):
    """Blocks of two positions, one of them, and the position behind the last block; or all, where there are few."""
    trace, every = plain.trace(IDS), torch.arange(len(IDS))
    (theirs,) = plain.model(torch.tensor([IDS]), output_attentions=True).attentions
    record = trace.layers[1].attention
    assert torch.allclose(attention_probabilities(record, every, every, torch.float32), theirs[0], atol=1e-6)
    assert record.chosen_keys.shape == (9, 3) and (record.chosen_keys[-1] >= 0).sum() == 3
    assert plain.trace(IDS[:3]).layers[1].attention.chosen_keys is None
    mask = torch.tensor([[True, False, False], [True, True, False], [False, True, True]])[None, None]
    assert seen_in(mask, 2).tolist() == [[[0, -1], [1, 0], [2, 1]]]


def without(trace, layer):
    """The same trace, as if nothing entered behind a layer."""
    layers = list(trace.layers)
    layers[layer] = replace(layers[layer], streams=replace(layers[layer].streams, entering=None))
    return replace(trace, layers=layers)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", [Tokens(), Tokens(1), Heads(0), Modules(0)], ids=["tokens", "later", "heads", "modules"]
)
def test_what_enters_later_is_the_tokens_own_or_goes_to_bias(dp, trace, kind):
    entering = trace.layers[1].streams.entering
    assert trace.layers[0].streams.entering is None and entering.norm() > 0.01 * trace.resid(2).norm()
    whole = dp.decompose(trace, kind, end=2)
    assert whole.completeness_error < 1e-12
    with pytest.warns(UserWarning, match="completeness"):
        less = dp.decompose(without(trace, 1), kind, end=2)
    gained = whole.dense() - less.dense()
    if kind == Tokens():
        assert whole.labels == less.labels and "bias" not in whole.labels
        assert torch.allclose(gained.diagonal().T, entering, atol=1e-12)
        gained[range(9), range(9)] = 0.0
    else:
        bias = whole.labels.index("bias")
        assert torch.allclose(gained[:, bias], entering, atol=1e-12)
        gained[:, bias] = 0.0
    assert gained.abs().max() < 1e-12


@torch.no_grad()
def test_a_part_of_the_tokens_gets_its_own(dp, trace):
    """A state of some tokens alone, as a rank or a close look has it; and of prompts one after the other."""
    both = dp.trace([IDS, IDS[:4]])
    names, maps = (
        tuple("abcdefghi"),
        LayerStreams(*both.layers[1].streams.each(), entering=both.layers[1].streams.entering),
    )
    whole = [Components.tokens(names[:n], (), set(), True) for n in (9, 4)]
    part = [one.only(np.array(places)) for one, places in zip(whole, ([1, 6], [0]), strict=True)]
    state = empty_part(Tokens(), dp.adapter, both, part, torch.float64)
    layer, record = replace(dp.adapter.layer(1), mlps=()), replace(both.layers[1], mlps=())
    state = through_mlps(state, layer, record, maps, dp.options.build(dp.adapter))
    where = np.flatnonzero(state.rows.any(1).numpy())
    segments, rows = state.layout.token_rows()
    assert where.tolist() == rows.tolist() and segments.tolist() == [1, 6, 9]
    assert torch.equal(state.rows[where], maps.entering[segments])


def test_what_starts_behind_it_has_it_in_its_rest(dp, trace):
    state = dp.start(trace, Neurons(1))
    assert "bias" not in state.labels and state.labels[-1] == "rest"
    neurons = state.dense()[:, :-1].sum(1)
    whole = dp.start(trace, Modules(1, "mlp")).dense()[:, 0]
    assert torch.allclose(whole, neurons, atol=1e-12)
    rest = trace.layers[1].resid_mid + trace.layers[1].streams.entering
    assert torch.allclose(state.dense()[:, -1], rest, atol=1e-12)


def test_streamed_and_verified(dp, trace):
    for kind in (Tokens(), Heads(1)):
        whole = dp.attribute(trace, kind, 5, verify=True)
        assert whole.verification.passed and float(whole.verification.error) < 1e-12
        streamed = dp.attribute(trace, kind, 5, stream=True, memory_budget=20_000)
        assert torch.allclose(streamed.scores, whole.scores, rtol=0, atol=1e-12)


def test_a_ledger_has_the_same_scores_and_keeps_them(dp, tmp_path):
    prompts = [IDS, IDS[:4]]
    book, both = dp.ledger(prompts, 5, position=[1, -1]), dp.trace(prompts)
    book.save(tmp_path / "book")
    again = dp.load_ledger(tmp_path / "book")
    for kind in (Tokens(), Tokens(1), Heads(0), Neurons(1)):
        exact = dp.attribute(both, kind, 5, position=[1, -1], allocation=book.rule, method="exact")
        for found in (book.scores(kind), again.scores(kind)):
            for ours, theirs in zip([x for one in found for x in one], [x for one in exact for x in one], strict=True):
                assert ours.labels == theirs.labels and ours.completeness_error < 1e-12
                assert torch.allclose(ours.scores, theirs.scores, rtol=0, atol=1e-12)


def test_what_is_not_declared_is_refused():
    made = model()
    reader = made.model.layers[1].mlp_hyper_connection
    forward = type(reader).forward

    def read(self, x):
        mixed, streams, write = forward(self, x)
        return mixed * 1.01, streams, write

    reader.forward = types.MethodType(read, reader)
    with pytest.raises(RuntimeError, match="layer 1: .*mlp reads something else of the residual streams"):
        DePass(made, progress=False).trace(IDS)
    assert not {"qwen4_exp", NAME} & set(REASONS)
