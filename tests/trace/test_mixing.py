"""Recurrences: the chunks against the definition, the two ways to apply them, what is refused on models with them."""

from __future__ import annotations

import re

import pytest
import torch

from depass_fast import Custom, DePass, Heads, Modules, Neurons, Tokens
from depass_fast.adapters.recurrent import knows_recurrences
from depass_fast.compat import decomposed_state_manager
from depass_fast.evaluate.frozen import frozen_attention
from depass_fast.evaluate.methods.base import NotPossibleError
from depass_fast.evaluate.methods.relevance import copied
from depass_fast.trace import mixing
from depass_fast.trace import scan as scans
from depass_fast.trace.attention import attention_probabilities
from depass_fast.trace.constants import constant_values
from depass_fast.trace.mixing import FrozenMixing, convolve
from depass_fast.trace.scan import Steps, scan, scan_back
from tests.support.family_models import build_variant
from tests.support.models import random_ids

pytestmark = pytest.mark.skipif(not knows_recurrences(), reason="the installed transformers is too old")


def step_by_step(q, k, decay, write, corrects, x):
    """The recurrence by its definition, one position after the other."""
    state, out = x.new_zeros(len(x), k.shape[2], x.shape[2]), torch.empty_like(x)
    for t in range(x.shape[1]):
        state = state * decay[:, t].exp()[..., None]
        u = x[:, t] - (torch.einsum("hnf,hn->hf", state, k[:, t]) if corrects else 0.0)
        u = u if write is None else u * write[:, t, None]
        state = state + k[:, t, :, None] * u[:, None]
        out[:, t] = torch.einsum("hnf,hn->hf", state, q[:, t])
    return out


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 150])
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize("writes", [False, True])
def test_chunks_are_the_recurrence(length, channels, corrects, writes):
    g = torch.Generator().manual_seed(length)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k = random(3, length, 5), torch.nn.functional.normalize(random(3, length, 5), dim=-1)
    decay = -random(3, length, channels).exp()
    write = random(3, length).sigmoid() if writes else None
    x = random(3, length, 7)
    wanted = step_by_step(q, k, decay, write, corrects, x)
    got = scan(Steps(q, k, decay, write).at, corrects, x)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))
    y = random(3, length, 7)
    for before in (False, True):
        leaf = x.clone().requires_grad_()
        there = scan(Steps(q, k, decay, write).at, corrects, leaf, before=before)
        (wanted,) = torch.autograd.grad(there, leaf, y)
        back = scan_back(Steps(q, k, decay, write).at, corrects, y, before=before)
        assert torch.allclose(back, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("length", "channels", "writes"), [(1, 1, True), (16, 5, False), (70, 5, True)])
def test_channels_of_few_columns_go_step_by_step(length, channels, writes, before, monkeypatch):
    """Forward and back, to what chunks give."""
    g = torch.Generator().manual_seed(length)
    q, k = torch.randn(2, 8, length, 5, dtype=torch.float64, generator=g)
    decay = -torch.rand(8, length, channels, dtype=torch.float64, generator=g)
    write = torch.rand(8, length, dtype=torch.float64, generator=g) if writes else None
    x, own = torch.randn(8, length, 3, dtype=torch.float64, generator=g), torch.rand(8, 1, 1, dtype=torch.float64)
    steps = Steps(q, k, decay, write)
    for run in (scan, scan_back):
        wanted = run(steps.at, False, x, before=before, own=own)
        with monkeypatch.context() as few:
            few.setattr(scans, "CHANNELS", 8)
            few.setattr(scans._Chunk, "of", None)
            assert torch.allclose(run(steps.at, False, x, before=before, own=own), wanted, rtol=0, atol=1e-12)


def test_all_parts_of_channels_go_step_by_step():
    for heads in (256, 300, 5000, 100_000):
        parts = scans.parts_of_heads(heads, 1, 16, True, True)
        assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]] and parts[-1].stop == heads
        assert all(part.stop - part.start >= scans.CHANNELS for part in parts)
    assert len(scans.parts_of_heads(5000, 64, 16, False, True)) > 1


def test_steps_leave_no_denormal_numbers(monkeypatch):
    """A value, or a gradient, that decays for long."""
    monkeypatch.setattr(scans, "CHANNELS", 1)
    ones = torch.ones(1, 400, 1)
    steps = Steps(ones, ones, torch.full((1, 400, 1), -0.5), None)
    x = torch.zeros(1, 400, 1)
    x[:, 0] = 1.0
    for found in (scan(steps.at, False, x), scan_back(steps.at, False, x.flip(1)).flip(1)):
        assert ((found == 0) | (found >= torch.finfo(torch.float32).tiny)).all()
        assert torch.allclose(found[0, :120, 0], (-0.5 * torch.arange(120)).exp(), rtol=1e-4, atol=1e-28)


def test_what_is_cut_on_its_way_is_nothing():
    """Numbers on their way to a matrix that would be denormal are zero, and none that counts is another."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 150, 5, generator=g)
    k, decay = torch.nn.functional.normalize(k, dim=-1), -torch.rand(4, 150, 1, generator=g).exp()
    one, tiny = torch.eye(150).expand(4, -1, -1), torch.finfo(torch.float32).tiny
    whole = scan(Steps(q, k, decay, None).at, True, one)
    assert ((whole != 0) & (whole.abs() < tiny)).any() and torch.equal(one, torch.eye(150).expand(4, -1, -1))
    wide = Steps(q.double(), k.double(), decay.double(), None)  # sums that cancel are off by parts of them in float32
    exact, cut = (scan(wide.at, True, one.double(), nothing) for nothing in (0.0, tiny**0.5))
    assert torch.allclose(cut, exact, rtol=1e-9, atol=1e-17)


def test_strong_decays_neither_overflow_nor_underflow():
    q = k = torch.ones(1, 200, 2)
    decay = torch.full((1, 200, 1), -50.0)
    out = scan(Steps(q, k, decay, None).at, False, torch.ones(1, 200, 3))
    assert torch.allclose(out, torch.full_like(out, 2.0))


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2: biases", "granitemoehybrid: state spaces"])
@torch.no_grad()
def test_a_matrix_running_over_values_and_the_transpose_agree(name, monkeypatch):
    dp = DePass(build_variant(name).double())
    trace, weights = dp.trace(torch.tensor(random_ids(40))), dp.adapter.attention(0)
    record = trace.layers[0].attention

    def both(values, y):
        mixed = FrozenMixing(weights, record, slice(0, 40), torch.float64)
        return mixed.forward(values), mixed.back(y)[0]

    values, y = torch.randn(2, 40, 3, weights.v.shape[0], dtype=torch.float64)
    out, back = both(values, y)
    monkeypatch.setattr(mixing, "LONGEST_MATRIX", 0)
    again, back_again = both(values, y)
    assert torch.allclose(out, again, atol=1e-10) and torch.allclose(back, back_again, atol=1e-10)
    assert torch.isclose((out * y).sum(), (values * back).sum())
    later = FrozenMixing(weights, record, slice(0, 40), torch.float64).forward(values[7:], 7)
    values[:7] = 0
    assert torch.allclose(later, both(values, y)[0][7:], atol=1e-10)


def test_a_long_prompt_is_complete_without_matrices(monkeypatch):
    monkeypatch.setattr(mixing, "LONGEST_MATRIX", 0)
    dp = DePass(build_variant("qwen3_5_text").double())
    ids = torch.tensor(random_ids(30))
    result = dp.attribute(ids, Tokens(), 5, backend="torch")
    assert result.completeness_error <= 1e-12
    assert torch.allclose(result.scores, dp.attribute(ids, Tokens(), 5, backend="reference").scores, atol=1e-9)
    ledger = dp.ledger(ids, 5, rule="shapley")
    wanted = dp.attribute(ids, Heads(0), 5, allocation="shapley", method="exact")
    assert torch.allclose(ledger.heads(0).scores, wanted.scores, atol=1e-9)


@torch.no_grad()
def test_the_mixing_matrix_is_what_the_heads_apply():
    dp = DePass(build_variant("mamba2").double())
    trace, weights = dp.trace(torch.tensor(random_ids(12))), dp.adapter.attention(0)
    mixed = FrozenMixing(weights, trace.layers[0].attention, slice(0, 12), torch.float64)
    matrix = mixed.matrix(slice(0, weights.n_heads))
    assert matrix.shape == (weights.n_heads, 12, 12) and not matrix.triu(1).any()
    values = torch.randn(12, 1, weights.v.shape[0], dtype=torch.float64)
    heads = mixed.shaped(values)[:, 0].unflatten(-1, (weights.n_heads, -1))
    wanted = torch.einsum("hqk,khd->qhd", matrix, heads).flatten(1) * trace.layers[0].attention.out_ratio
    assert torch.allclose(mixed.forward(values)[:, 0], wanted)


@pytest.mark.parametrize("name", ["mamba2: biases", "mamba", "falcon_h1", "qwen3_next"])
@torch.no_grad()
def test_constants_pass_a_recurrence_beside_the_values(name, monkeypatch):
    """In one pass for every layer and prompt; and what heads make of them is what they make of them alone."""
    dp, prompts, run = DePass(build_variant(name).double()), [random_ids(9), random_ids(60), random_ids(1)], []
    monkeypatch.setattr(mixing, "scan", lambda *given, **more: run.append(given[2].shape) or scan(*given, **more))
    trace, mixers = dp.trace(prompts), [i for i in range(dp.adapter.n_layers) if dp.adapter.kind(i).mixer is not None]
    beside = name == "falcon_h1"  # constants wait for the softmax's factors there
    assert len(run) == len(mixers) * len(prompts) * (1 + beside)
    for index in mixers:
        record, weights = trace.layers[index].attention, dp.adapter.attention(index)
        given = constant_values(weights, record, [9, 60, 1])
        assert (given is None) == (record.constant_heads is None) == (name == "qwen3_next")
        if given is not None:
            given = given if record.value_ratio is None else given * record.value_ratio
            wanted = mixing.apply(weights, record, given[:, None], [9, 60, 1])[:, 0]
            wanted = wanted if record.out_constant is None else wanted + record.out_constant
            assert torch.allclose(record.constant_heads, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


def test_a_convolution_stays_within_its_prompt():
    x, weight = torch.randn(9, 4), torch.randn(4, 3)
    apart = [convolve(part, weight, None, [len(part)]) for part in x.split([5, 1, 3])]
    assert torch.allclose(convolve(x, weight, None, [5, 1, 3]), torch.cat(apart), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (Heads(1), "layer 1 has no heads: it does not mix positions."),
        (Neurons(0), "layer 0 has no neurons: it has no MLP."),
        (Modules(0, which="mlp"), "which: layer 0 has no MLP."),
        (Modules(1, which="attention"), "which: layer 1 has no attention."),
    ],
)
def test_parts_that_a_layer_lacks_are_refused_before_any_work(kind, problem):
    dp = DePass(build_variant("nemotron_h"))
    with pytest.raises(ValueError, match=re.escape(problem)):
        dp.attribute(random_ids(5), kind)


def test_methods_without_a_meaning_are_refused():
    dp = DePass(build_variant("qwen3_5_text"))
    ids = random_ids(5)
    with pytest.raises(ValueError, match="this one has: recurrences, gates in front of the projection of heads"):
        dp.attribute(ids, Neurons(layers="all"), method="adjoint")
    assert dp.attribute(ids, Neurons(layers="all"), method="adjoint", allocation="shapley").scores.isfinite().all()
    with pytest.raises(ValueError, match="the published interface is for models"):
        decomposed_state_manager(dp.model, None)


def test_what_reads_probabilities_refuses_a_recurrence():
    dp = DePass(build_variant("qwen3_5_text"))
    trace = dp.trace(random_ids(5))
    with pytest.raises(ValueError, match="a recurrence has no attention probabilities"):
        attention_probabilities(trace.layers[0].attention, torch.arange(5), torch.arange(5), torch.float32)
    with pytest.raises(ValueError, match="held attention is for models"), frozen_attention(dp, trace):
        pass
    with pytest.raises(NotPossibleError, match="recurrences"), copied(dp, trace, "half", 0.5):
        pass


def test_both_modules_of_a_layer_with_one_are_that_one():
    dp = DePass(build_variant("nemotron_h"))
    assert dp.attribute(random_ids(5), Modules(1)).labels[0] == "L1.mlp"
    assert dp.attribute(random_ids(5), Modules(0)).labels[0] == "L0.attn"


def test_a_state_may_start_in_the_middle_and_verify_watches_it():
    dp = DePass(build_variant("bamba"))
    ids = random_ids(8)
    trace = dp.trace(ids)
    shares = torch.rand(8, 3, 1) / 2
    result = dp.attribute(trace, Custom(1, shares * trace.resid(1)[:, None]), 5, verify=True)
    assert result.completeness_error <= 1e-5


def test_a_saved_trace_of_a_recurrence_is_read_again(tmp_path):
    dp = DePass(build_variant("qwen3_next"))
    trace = dp.trace(random_ids(7))
    torch.save(trace, tmp_path / "trace.pt")
    again = torch.load(tmp_path / "trace.pt", weights_only=False)
    assert torch.equal(dp.attribute(again, Tokens(), 5).scores, dp.attribute(trace, Tokens(), 5).scores)
