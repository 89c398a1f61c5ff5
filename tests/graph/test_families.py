"""Graphs of every kind of architecture: what comes into each node sums to its activation, in float64 to rounding."""

import numpy as np
import pytest
import torch

from depass_fast import DePass, LogProb, Tokens
from depass_fast.graph.graph import Graph
from tests.support.family_models import available, build_variant
from tests.support.models import random_ids, runs

RULES = ("shapley", "half", "taylor")
NAMES = [
    "llama: biases",
    "gpt2",
    "gpt_neox: parallel",
    "opt: stream norms, projected embedding",
    "gemma2: tight caps",
    "olmo: clamped, biases",
    "granite: biases",
    "falcon: RW, ALiBi",
    "mpt: clamped, scaled",
    "mixtral: top-1, window",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_next",
    "jamba",
    "kimi_linear",
    "llama4_text",
    "minimax",
]


def test_layers_with_several_norms_are_refused():
    if not available("gemma4_text: MHA, biases"):
        pytest.skip("not in this version of transformers")
    dp = DePass(build_variant("gemma4_text: MHA, biases"))
    with pytest.raises(
        ValueError, match="model: a graph does not know all that this model has: norms of heads' values"
    ):
        dp.graph([1, 2, 3], 5)


def recomposed(graph: Graph) -> np.ndarray:
    """Every node's share in the target, from its edges alone: what it gives to each node, times what that is worth.

    The columns are tokens, kept nodes, `others` and `bias`.
    """
    worth = np.ones(len(graph.shares))  # of a unit of each row's activation
    found = np.zeros(graph.shares.shape[1])
    for row, shares in enumerate(graph.shares):
        if row:
            worth[row] = found[len(graph.tokens) + row - 1] / graph.activations[row]
        found += worth[row] * shares
    return found


@pytest.mark.parametrize("name", [name for name in NAMES if available(name)])
def test_incoming_edges_sum_to_the_activation(name):
    model, number = build_variant(name), NAMES.index(name)
    model = model if runs(model.double()) else model.float()
    allowed = 1e-12 if model.dtype == torch.float64 else 2e-6
    dp, rule = DePass(model), RULES[number % 3]
    # all of them in rows of their own, or a few at a time
    graph = dp.graph(random_ids(7), LogProb(5), rule=rule, nodes=40, memory_budget=None if number % 2 else 1 << 17)
    assert len(graph.seats) == 40
    assert graph.completeness_error <= allowed
    off = graph.shares.sum(1) - graph.activations
    assert (np.abs(off) <= 4 * allowed * np.abs(graph.shares).sum(1)).all()
    target = dp.attribute(random_ids(7), Tokens(), LogProb(5)).target_logits
    assert float(target) == pytest.approx(graph.activations[0], rel=1e-5)


@pytest.mark.parametrize("name", ["llama: biases", "gpt_neox: parallel", "gemma2", "mixtral", "qwen3_next"])
@pytest.mark.parametrize("kinds", [("neurons",), ("heads", "neurons")])
def test_with_all_nodes_the_edges_make_up_every_share(name, kinds):
    """With all neurons as nodes nothing is pruned, and edges put together give the ledger's scores."""
    model = build_variant(name)
    dp = DePass(model if runs(model.double()) else model.float())
    tight = 1e-9 if model.dtype == torch.float64 else 2e-3
    graph = dp.graph(random_ids(4), 5, nodes=9_000, kinds=kinds)
    assert np.abs(graph.shares[:, -2]).max() <= tight * np.abs(graph.shares).max()
    found = recomposed(graph)
    ledger, n = dp.ledger(random_ids(4), 5), len(graph.tokens)
    wanted = ledger.tokens().scores.double().numpy()
    largest = np.abs(wanted).max()
    assert np.abs(found[:n] - wanted[:n]).max() <= tight * largest
    if len(wanted) > n:
        assert abs(found[-1] - wanted[n]) <= tight * max(largest, abs(wanted[n]))
    shares = np.array([seat.share for seat in graph.seats])
    assert np.abs(found[n:-2] - shares).max() <= tight * np.abs(shares).max()
    neurons: dict[str, float] = {}
    for seat in graph.seats:
        neurons[seat.label] = neurons.get(seat.label, 0.0) + seat.share
    for layer in ledger.neurons():
        for label, score in layer.top(3):
            assert neurons[label] == pytest.approx(score, rel=1e-6 if model.dtype == torch.float64 else 1e-3)
