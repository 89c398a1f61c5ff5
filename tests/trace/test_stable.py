"""mLSTM: exponential writes and its division against the definition, fused weights, and prompts beyond a chunk."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from depass_fast import DePass, Heads, Tokens
from depass_fast.adapters.recurrent import knows_recurrences, mlstm, wkv
from depass_fast.trace.scan import Steps, scan
from depass_fast.trace.stable import stable
from tests.support.family_models import build_variant
from tests.support.models import random_ids

pytestmark = pytest.mark.skipif(not knows_recurrences(), reason="the installed transformers is too old")

EPS = 1e-6


def by_definition(q, k, gates, x):
    """The outputs (T, H, d) of mLSTM without any stabiliser: exponentials as they are, in float64."""
    write, forget = (gate.double() for gate in gates.chunk(2, -1))
    q, k, x = q.double() * q.shape[2] ** -0.5, k.double(), x.double()
    state, ones = x.new_zeros(*k.shape[1:], x.shape[2]), x.new_zeros(k.shape[1:])
    m, out = x.new_zeros(k.shape[1]), torch.empty_like(x)
    for t in range(len(x)):
        m = torch.maximum(torch.nn.functional.logsigmoid(forget[t]) + m, write[t])
        state = (
            forget[t].sigmoid()[:, None, None] * state
            + write[t].exp()[:, None, None] * k[t, :, :, None] * x[t, :, None]
        )
        ones = forget[t].sigmoid()[:, None] * ones + write[t].exp()[:, None] * k[t]
        n = (ones * q[t]).sum(1)
        out[t] = (state * q[t][..., None]).sum(1) / (n.abs().clamp_min(1.0) + EPS * m.exp())[:, None]
    return out


@pytest.mark.parametrize("loud", [1.0, 60.0])
def test_the_held_state_gives_what_the_definition_gives(loud):
    """Prompts of several lengths side by side, with writes that float32 could not hold."""
    g, lengths = torch.Generator().manual_seed(0), [70, 1, 20]
    q, k = torch.randn(2, 91, 3, 4, generator=g, dtype=torch.float64)
    x, gates = (torch.randn(91, *shape, generator=g, dtype=torch.float64) for shape in ((3, 5), (6,)))
    gates *= loud
    narrow = stable(mlstm(q.float(), k.float(), gates.float(), None, EPS), lengths)
    assert narrow.q.dtype == torch.float32 and narrow.q.isfinite().all()
    held = stable(mlstm(q, k, gates, None, EPS), lengths)
    assert held.log_write is None and held.divisor is None
    assert (held.decay <= 0).all() and (held.write <= 1).all() and held.q.isfinite().all()
    parts, first = [], 0
    for length in lengths:
        at = slice(first, first + length)
        of = [y[at].transpose(0, 1) for y in (held.q, held.k, held.decay, held.write, x)]
        wanted, got = (
            by_definition(q[at], k[at], gates[at], x[at]),
            scan(Steps(*of[:4]).at, False, of[4]).transpose(0, 1),
        )
        parts.append(float((got - wanted).abs().max() / wanted.abs().max()))
        first += length
    assert max(parts) <= 1e-10


@torch.no_grad()
def test_fused_weights_are_the_same_model():
    from transformers.initialization import no_init_weights  # not in the oldest supported transformers

    apart = build_variant("xlstm: biases").double()
    config = copy.deepcopy(apart.config)
    config.weight_mode = "fused"
    with no_init_weights():  # transformers' own would fail
        fused = AutoModelForCausalLM.from_config(config).double().eval()
    given, names = (
        apart.state_dict(),
        {
            "qkv_opreact": ("q", "k", "v", "ogate_preact"),
            "ifgate_preact": ("igate_preact", "fgate_preact"),
            "proj_up_gate_z": ("proj_up_gate", "proj_up"),
        },
    )
    for name, parameter in fused.named_parameters():
        home, _, last = name.rpartition(".")
        parent, _, module = home.rpartition(".")
        several = [f"{parent}.{one}.{last}" for one in names.get(module, ())] or [name]
        parameter.copy_(torch.cat([given[one] for one in several]))
    ids = torch.tensor(random_ids(9))
    for kind in (Tokens(), Heads(1)):
        one, other = (DePass(model).attribute(ids, kind, 5) for model in (apart, fused))
        assert other.completeness_error <= 1e-12
        assert torch.allclose(one.scores, other.scores, rtol=0, atol=1e-9)


def test_a_prompt_longer_than_the_models_own_chunks_is_one_pass():
    model = build_variant("xlstm")
    ids = torch.tensor(random_ids(9))
    whole = DePass(model).attribute(ids, Tokens(), 5)
    model.config.max_inference_chunksize = 4
    assert torch.equal(DePass(model).attribute(ids, Tokens(), 5).scores, whole.scores)
    assert model.config.max_inference_chunksize == 4


def test_another_mode_is_refused():
    model = build_variant("xlstm")
    model.config.mode = "train"
    with pytest.raises(ValueError, match="its mode is 'train'"):
        DePass(model)


@pytest.mark.parametrize("loud", [1.0, 60.0])
def test_a_state_that_is_read_in_front_of_its_own_position(loud):
    """RWKV: a softmax-like mean of what came before, and of a position's own value with a bonus."""
    g, lengths = torch.Generator().manual_seed(0), [70, 1, 20]
    k, x = torch.randn(2, 91, 3, generator=g, dtype=torch.float64)
    k, rate, bonus = k * loud, torch.rand(3, generator=g, dtype=torch.float64), torch.tensor([0.5, -20.0, 3.0]).double()
    held = stable(wkv(k, rate, bonus), lengths)
    assert (held.decay <= 0).all() and held.q.isfinite().all() and held.own is not None
    first = 0
    for length in lengths:
        at, steps = slice(first, first + length), torch.arange(length)
        apart = (steps[:, None] - 1 - steps)[..., None]
        logits = torch.where(apart >= 0, k[at] - apart * rate, torch.where(apart == -1, k[at] + bonus, -torch.inf))
        wanted = torch.einsum("tih,ih->th", logits.softmax(1), x[at])
        of = [y[at].transpose(0, 1) for y in (held.q, held.k.expand(-1, 3, -1), held.decay, held.write, x[..., None])]
        got = scan(Steps(*of[:4]).at, False, of[4], before=True)[..., 0].T + held.own[at] * x[at]
        assert torch.allclose(got, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))
        first += length
