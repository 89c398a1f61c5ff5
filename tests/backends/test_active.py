"""Neurons whose activation is exactly zero drop out, position by position; the numbers stay the same."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from depass_fast import DePass, Heads, Neurons, Tokens
from depass_fast.allocation import NAMES, softmax
from depass_fast.backends import active
from tests.support.components import kinds
from tests.support.family_models import VARIANTS, available, build_model
from tests.support.models import build, random_ids
from tests.support.states import close

RELU = {
    "opt": {},
    "opt: stream norms, projected embedding": {},
    "nemotron: biases": {},
    "arcee": {},
    "persimmon": {},
    "gpt2: unscaled": {},
    "olmo2": {"hidden_act": "relu"},  # gated, with norms on the outputs
    "mixtral": {"hidden_act": "relu"},
}
SOME = ("opt", "olmo2", "mixtral")  # for kernels that are interpreted
FREE = active.Costs(0.0, 0.0, 0.0, 1)


@functools.cache
def relu_model(name: str) -> DePass:
    model_type, changes = VARIANTS[name]
    return DePass(build_model(model_type, **{**changes, **RELU[name]}))


@pytest.fixture
def groups(monkeypatch):
    """The groups of every MLP that is carried; gathering costs nothing, so that small models drop neurons, too."""
    found, make = [], active.make_groups
    monkeypatch.setattr(active.Costs, "on", lambda *_: FREE)
    monkeypatch.setattr(active, "make_groups", lambda *given: found.append(make(*given)) or found[-1])
    return found


@pytest.mark.parametrize(
    ("backend", "name", "rule"),
    [("torch", name, rule) for name in RELU for rule in NAMES]
    + [("triton", name, rule) for name in SOME for rule in NAMES if name == "olmo2" or rule == "softmax"],
)
def test_families_with_relu_agree_with_the_reference(backend, name, rule, groups):
    if not available(name):
        pytest.skip("this transformers does not know the family")
    dp, ids = relu_model(name), random_ids(6 if backend == "triton" else 9, seed=5)
    trace = dp.trace(ids)
    for label, kind in kinds(len(ids)).items():
        if backend == "triton" and label not in ("tokens@0", "neurons@0"):
            continue
        oracle = dp.decompose(trace, kind, allocation=rule, backend="reference").dense()
        assert close(dp.decompose(trace, kind, allocation=rule, backend=backend).dense(), oracle), label
    done = [len(neurons) for one in groups if one is not None for neurons in one.neurons]
    if rule in ("half", "shapley"):  # a coefficient need not vanish where the activation does
        assert not done
    else:
        assert done and np.mean(done) < 0.8 * dp.adapter.layer(0).mlp.gate.shape[0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_batch_of_prompts_and_any_workspace(backend, groups):
    dp, prompts = relu_model("opt"), [random_ids(n, seed=n) for n in (4, 1, 6, 4)]
    for kind in (Tokens(), Heads(1), Neurons(0)):
        for budget in (None, 20_000):
            together = dp.attribute(prompts, kind, backend=backend, memory_budget=budget)
            for prompt, batched in zip(prompts, together, strict=True):
                alone = dp.attribute(prompt, kind, backend="reference")
                assert close(batched.scores, alone.scores)
    assert any(one is not None for one in groups)


def test_decompositions_of_several_layers_go_together(groups):
    dp, ids = relu_model("opt"), random_ids(7)
    together = dp.attribute(ids, Neurons(layers="all"), method="exact", backend="torch")
    apart = dp.attribute(ids, Neurons(layers="all"), method="exact", backend="reference")
    assert any(one is not None for one in groups)
    assert all(close(a.scores, b.scores) for a, b in zip(together, apart, strict=True))


def test_a_rule_of_ones_own_sees_the_neurons_that_write(groups):
    dp, seen = relu_model("opt"), []

    def rule(gates, temperature):
        seen.append(gates.values.shape[2])
        assert gates.total.shape == gates.values[:, 0].shape
        return softmax(gates, temperature)

    trace = dp.trace(random_ids(5))
    found = dp.decompose(trace, Tokens(), allocation=rule).dense()
    assert close(found, dp.decompose(trace, Tokens(), backend="reference").dense())
    assert max(seen) < dp.adapter.layer(0).mlp.gate.shape[0]


def test_half_precision(groups):
    dp, ids = relu_model("opt"), random_ids(9)
    trace = dp.trace(ids)
    oracle = dp.decompose(trace, Neurons(0), backend="reference").dense()
    assert close(dp.decompose(trace, Neurons(0), compute_dtype="bfloat16").dense(), oracle, 0.1)


def test_activations_that_are_changed_are_looked_at_again(groups):
    dp = relu_model("opt")
    trace = dp.trace(random_ids(6))
    dp.decompose(trace, Tokens())
    for change in (lambda act: act.add_(1.0), lambda act: act.clone()):
        mlp = trace.layers[1].mlps[0]
        mlp.act = change(mlp.act)
        oracle = dp.decompose(trace, Tokens(), backend="reference").dense()
        assert close(dp.decompose(trace, Tokens(), backend="torch").dense(), oracle)
    with torch.inference_mode():
        trace = dp.trace(random_ids(6))
        dp.decompose(trace, Tokens())
        trace.layers[1].mlps[0].act.add_(1.0)
        oracle = dp.decompose(trace, Tokens(), backend="reference").dense()
        assert close(dp.decompose(trace, Tokens(), backend="torch").dense(), oracle)


def test_a_trace_is_looked_at_once_with_one_copy_to_the_host(monkeypatch):
    dp, copies, cpu = relu_model("opt"), [], torch.Tensor.cpu
    trace = dp.trace(random_ids(6))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(1) or cpu(tensor))
    for _ in range(2):
        active.look(dp.adapter, trace, 0, dp.adapter.n_layers)
        assert len(copies) == 1


def test_other_models_are_not_looked_at(groups, monkeypatch):
    monkeypatch.setattr(active, "_packed", lambda act: pytest.fail("looked at"))
    build("llama-gqa").decompose(random_ids(5), Tokens())
    assert groups and not any(groups)


@torch.no_grad()
def test_nan_is_not_hidden(groups):
    dp = relu_model("opt")
    trace = dp.trace(random_ids(6))
    state = dp.start(trace, Heads(0))
    rows = state.block(0)
    rows[0, 1, 0] = torch.nan
    state.set_block(0, rows)
    found = dp.carry(trace, state).dense()
    assert found[0].isnan().any() and any(one is not None for one in groups)


def test_a_model_without_any_active_neuron(groups):
    model = build_model("opt", ffn_dim=48, word_embed_proj_dim=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("fc1.bias"):
                parameter.fill_(-100.0)
    dp = DePass(model)
    trace = dp.trace(random_ids(5))
    for backend in ("torch", "triton"):
        oracle = dp.decompose(trace, Tokens(), backend="reference").dense()
        assert close(dp.decompose(trace, Tokens(), backend=backend).dense(), oracle)
    assert all(len(neurons) == 1 for one in groups if one is not None for neurons in one.neurons)


# -- the grouping alone -----------------------------------------------------------------------------------------------


def activity(writes: np.ndarray) -> active.Activity:
    return active.Activity(active._packed(torch.from_numpy(writes).float()).numpy(), writes.shape[1], 0)


@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (13, 63), (64, 111), (100, 20)])
def test_bits_and_unions_are_those_of_the_activations(shape):
    writes = np.random.default_rng(0).random(shape) < 0.2
    found = activity(writes)
    for level, numbers in enumerate(found.unions):
        blocks = [writes[i : i + 2**level].any(0).sum() for i in range(0, len(writes), 2**level)]
        assert numbers.tolist() == blocks
    for positions in (np.array([0]), np.arange(len(writes))):
        needed = np.flatnonzero(writes[positions].any(0))
        assert found.needed(positions, 1).tolist() == (needed.tolist() or [0])
        padded = found.needed(positions, 16)
        assert set(needed) <= set(padded) and len(set(padded)) == len(padded)
        assert len(padded) == min(shape[1], max(1, -(-len(needed) // 16)) * 16)


def test_positions_go_together_where_that_costs_less():
    """The tree finds the least of all its cuts; alike positions go together, others do not."""
    rng = np.random.default_rng(0)
    alike = np.repeat(rng.random((2, 64)) < 0.1, 8, 0)
    rows = np.full(16, 50.0)
    cost, begins = active._cheapest(activity(alike), rows, 32, 10_000, active.Costs(0.0, 1.0, 0.0, 1))
    assert np.flatnonzero(begins).tolist() == [0, 8]
    other = np.eye(16, 64) > 0
    assert active._cheapest(activity(other), rows, 32, 10_000, active.Costs(0.0, 1.0, 0.0, 1))[1].all()
    assert active._cheapest(activity(alike), rows, 32, 100, active.Costs(0.0, 1.0, 0.0, 1))[1][::2].all()
    whole = active.Costs(0.0, 1.0, 0.0, 1)
    n = [int(alike[i : i + 8].any(0).sum()) for i in (0, 8)]
    assert cost == sum(4 * 400 * k * 32 + 1 for k in n)
    assert whole.of(np.zeros(1), np.ones(1), 32) == 0
