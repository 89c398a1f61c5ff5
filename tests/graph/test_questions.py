"""The answers of a graph: tables, paths, influence and pruning; and what is refused before any work."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from depass_fast import CompletenessWarning, DePass, Features, Graph, LogProb
from depass_fast.demo import load_demo
from depass_fast.graph.between import Ways
from depass_fast.graph.influence import cumulative, fractions, influence
from tests.support.components import Dictionary
from tests.support.models import build, random_ids

PROMPT = "When Diane met Grace at the park, Grace handed the camera to"
IDS = random_ids(6, seed=3)


@pytest.fixture(scope="module")
def graph():
    return DePass(*load_demo()).graph(PROMPT, LogProb(" Diane"), nodes=50)


def test_tables(graph):
    kinds = [node.kind for node in graph.nodes]
    assert kinds[0] == "target" and kinds[1:15] == ["token"] * 14 and kinds.count("head") + kinds.count("neuron") == 50
    assert len({node.id for node in graph.nodes}) == len(graph.nodes) and "bias" not in kinds  # it has no constants
    assert (graph.tokens[2], graph.nodes[3].id, graph.nodes[3].index) == (" Diane", "' Diane'@2", graph.input_ids[2])
    for node in graph.nodes:
        edges = graph.incoming(node)
        assert edges == sorted(edges, key=lambda edge: -abs(edge.weight))
        assert all(edge.target == node.id for edge in edges)
        if node.activation is None:
            assert edges == []
        else:
            assert sum(edge.weight for edge in edges) == pytest.approx(node.activation, rel=1e-5, abs=1e-5)
        assert all(edge.source == node.id for edge in graph.outgoing(node))
        assert 0 <= node.influence <= 1
    assert sum(len(graph.incoming(node)) for node in graph.nodes) == len(graph.edges)
    nodes, edges = graph.to_dataframe("nodes"), graph.to_dataframe()
    assert list(nodes["id"]) == [node.id for node in graph.nodes] and nodes.attrs["rule"] == "shapley"
    assert edges["weight"].tolist() == [edge.weight for edge in graph.edges]
    with pytest.raises(ValueError, match="table: 'all' is not one of"):
        graph.to_dataframe("all")
    with pytest.raises(KeyError, match="'L0N107@1' is none of this graph; there are L0N107@"):
        graph.node("L0N107@1")


def test_the_leading_nodes_are_those_of_the_ledger():
    """Shares are those of a ledger, position by position; no node of a larger share was left out."""
    dp = build("llama-biases")
    ledger, shares = dp.ledger(IDS, 5), {}
    graph, every = (dp.graph(IDS, 5, nodes=nodes) for nodes in (50, 9_000))
    for node in every.nodes:
        if node.kind in ("head", "neuron"):
            shares[node.label] = shares.get(node.label, 0.0) + node.share
    for kind in (ledger.heads(), ledger.neurons()):
        for layer in kind:
            for label, score in layer.top(5):
                assert shares[label] == pytest.approx(score, rel=1e-4, abs=1e-6)
    least = min(abs(node.share) for node in graph.nodes if node.kind in ("head", "neuron"))
    left = {seat.id for seat in every.seats} - {seat.id for seat in graph.seats}
    assert left and all(abs(seat.share) <= least for seat in every.seats if seat.id in left)
    wanted = ledger.tokens().scores.tolist()[: len(IDS)]
    assert [node.share for node in graph.nodes[1 : 1 + len(IDS)]] == pytest.approx(wanted, abs=1e-5)


def dense(graph: Graph) -> tuple[np.ndarray, list[str]]:
    """circuit-tracer's adjacency matrix: a row and a column per node, the node that reads in the rows."""
    ids = [node.id for node in graph.nodes]
    matrix = np.zeros((len(ids), len(ids)))
    for edge in graph.edges:
        matrix[ids.index(edge.target), ids.index(edge.source)] = abs(edge.weight)
    return matrix / np.maximum(matrix.sum(1, keepdims=True), 1e-300), ids


def test_influence_is_the_sum_over_all_paths(graph):
    matrix, ids = dense(graph)
    every = np.linalg.inv(np.eye(len(ids)) - matrix)[0]  # the sum of its powers
    every[0] = 1.0
    assert [node.influence for node in graph.nodes] == pytest.approx(every.tolist(), rel=1e-9, abs=1e-12)
    ends = [i for i, node in enumerate(graph.nodes) if node.activation is None]
    assert sum(every[ends]) == pytest.approx(1.0)


def test_paths_are_the_strongest_of_all(graph):
    small = graph.prune(0.5, 0.8)
    matrix, ids = dense(small)
    tokens = {node.id for node in small.nodes if node.kind == "token"}
    found: list[tuple[float, tuple[str, ...]]] = []

    def walk(node: int, strength: float, behind: tuple[str, ...]) -> None:
        if ids[node] in tokens:
            found.append((strength, (ids[node], *behind)))
            return
        for source in np.flatnonzero(matrix[node]):
            walk(int(source), strength * matrix[node, source], (ids[node], *behind))

    walk(0, 1.0, ())
    found.sort(key=lambda one: -one[0])
    paths = small.paths(7)
    assert [path.strength for path in paths] == pytest.approx([strength for strength, _ in found[:7]])
    assert [path.nodes for path in paths] == [nodes for _, nodes in found[:7]]
    edges = {(edge.source, edge.target) for edge in small.edges}
    assert all(pair in edges for path in paths for pair in pairwise(path.nodes))
    assert " > ".join(graph.paths(1)[0].nodes) in repr(graph) and "leading paths" in str(graph)


@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.4, 0.7), (1.0, 0.5), (0.0, 0.0), (1.0, 1.0)])
def test_pruning_keeps_sums_and_what_leads(graph, thresholds):
    small = graph.prune(*thresholds)
    assert small.pruning == {"node_threshold": thresholds[0], "edge_threshold": thresholds[1]}
    kept = {node.id: node for node in small.nodes}
    for node in small.nodes:
        if node.activation is not None:
            assert node.activation == graph.node(node.id).activation
            weights = [edge.weight for edge in small.incoming(node)]
            assert sum(weights) == pytest.approx(node.activation, rel=1e-5, abs=1e-5)
        if node.kind in ("head", "neuron"):
            assert small.outgoing(node)  # nobody stays that nobody reads
    if thresholds == (1.0, 1.0):
        assert small.edges == graph.edges
        return
    assert len(small.nodes) < len(graph.nodes)
    seats = [node for node in graph.nodes if node.kind in ("head", "neuron")]
    gone = [node.influence for node in seats if node.id not in kept]
    if thresholds[1] > 0.9:
        assert max(gone) < max(node.influence for node in seats)
    whole = {(edge.source, edge.target): edge.weight for edge in graph.edges}
    for edge in small.edges:
        if not edge.source.startswith("others"):
            assert whole[edge.source, edge.target] == edge.weight


def test_levels_and_fractions():
    shares = np.array([[1.0, -3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert fractions(shares).tolist() == [[0.25, 0.75, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert influence(shares, 1).rows.tolist() == [1.0, 0.75]
    assert cumulative(np.array([1.0, 6.0, 3.0])).tolist() == pytest.approx([1.0, 0.6, 0.9])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"rule": "softmax"}, ValueError, "rule: 'softmax' is not linear, and has no ledger"),
        ({"nodes": 0}, ValueError, "nodes: 0 is out of range"),
        ({"nodes": 10_001}, ValueError, "nodes: 10001 is out of range"),
        ({"nodes": 2.5}, TypeError, "nodes"),
        ({"kinds": ["tokens"]}, ValueError, "kinds: expected a list of 'heads', 'neurons'"),
        ({"kinds": "heads"}, ValueError, "kinds: expected a list"),
        ({"kinds": []}, ValueError, "kinds: with none of them, features must be given"),
        ({"features": Dictionary()}, TypeError, "features: expected Features"),
        ({"features": [Features(1, Dictionary(), "resid_pre")] * 2}, ValueError, "two dictionaries are at the same"),
        ({"position": [1, 2]}, TypeError, "position"),
        ({"target": [5, 6]}, ValueError, "target: a graph is of one target"),
        ({"prompt": [IDS, IDS]}, ValueError, "prompt: a graph is of one prompt, got 2"),
        ({"stream": True}, ValueError, "stream: a ledger carries no states"),
        ({"method": "exact"}, TypeError, "method: "),
    ],
)
def test_refusals(given, error, message):
    with pytest.raises(error, match=message):
        build("llama-gqa").graph(**{"prompt": IDS, "target": 5, **given})


def test_thresholds_and_encoders_are_checked(graph):
    with pytest.raises(ValueError, match="node_threshold: 1.5 is out of range"):
        graph.prune(1.5)
    with pytest.raises(ValueError, match="edge_threshold: -1 is out of range"):
        graph.prune(0.5, -1)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        graph.save("nowhere/graph.json")
    with pytest.raises(ValueError, match="by: 'layer' is not one of 'head', 'key'"):
        graph.divide("' Diane'@2", "target", by="layer")
    with pytest.raises(ValueError, match="'key' is for edges into a head"):
        graph.divide("' Diane'@2", "target", by="key")
    with pytest.raises(ValueError, match="no edge comes into"):
        graph.divide("' Diane'@2", "' to'@13")
    sae = Dictionary()
    encode = sae.encode
    sae.encode = lambda x: encode(x).detach()
    with pytest.raises(ValueError, match="no gradient goes through the encoder of Dictionary"):
        build("llama-gqa").graph(IDS, 5, nodes=4, kinds=[], features=Features(1, sae, "resid_pre"))


def test_an_earlier_position_and_a_trace():
    dp = build("qwen2")
    whole = dp.graph(dp.trace(IDS), 5, nodes=20, position=2)
    alone = dp.graph(IDS[:3], 5, nodes=20)
    assert whole.tokens == alone.tokens and [node.id for node in whole.nodes] == [node.id for node in alone.nodes]
    assert whole.shares == pytest.approx(alone.shares, abs=1e-5)


def test_a_node_that_misses_its_activation_is_a_warning(monkeypatch):
    all_ways = Ways.all

    def off(self, budget):
        direct = all_ways(self, budget)
        direct.activations[3] *= 1.1
        return direct

    monkeypatch.setattr(Ways, "all", off)
    with pytest.warns(CompletenessWarning, match="the components miss a node's activation by"):
        found = build("llama-gqa").graph(IDS, 5, nodes=30)
    assert found.warnings and found.completeness_error > 1e-3


def test_rows_go_together_as_there_is_room():
    """However many rows go together, and in half precision, sums hold as far as the dtype goes."""
    dp = build("mistral-window")
    one, many = (dp.graph(IDS, 5, nodes=30, memory_budget=budget) for budget in (1, None))
    assert one.shares == pytest.approx(many.shares, abs=1e-5 * np.abs(many.shares).max())
    half = build("qwen3", torch.bfloat16).graph(IDS, 5, nodes=30)
    assert half.completeness_error < 0.05
