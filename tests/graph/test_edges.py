"""Edges one by one: what a source adds is run through a model whose norms, attention and MLPs are held."""

from contextlib import ExitStack

import pytest
import torch

from depass_fast import DePass, Features
from depass_fast.graph.intervene import _holding, _norms, _noting
from depass_fast.linear_rules import linear_shares
from depass_fast.trace.again import next_logits
from depass_fast.trace.exclusive import exclusive
from depass_fast.trace.held import held_attention
from tests.support.components import Dictionary
from tests.support.family_models import build_variant
from tests.support.models import random_ids

IDS = random_ids(6, seed=3)
NAMES = ["llama: GQA", "gemma2: tight caps", "gpt_neox: parallel", "olmo2: biases"]


def inputs_with(dp, graph, added=None):
    """The inputs of every MLP's gate and up, with ``added`` = (layer, position, vector) in the stream before a layer.

    Nothing but values and residual streams react. Returns [(gate, up), ...] by layer, and the logits.
    """
    model, adapter = graph.model, dp.adapter
    found, outputs = {}, []
    ids, norms = torch.tensor(IDS)[None], _norms(model)

    def note(name):
        return lambda _module, _args, out: found.update({name: out.reshape(len(IDS), -1)})

    with exclusive(adapter), ExitStack() as undo, torch.no_grad():
        mlps = [adapter.module(i, "mlp") for i in range(adapter.n_layers)]
        with _noting(norms) as scales, ExitStack() as once:
            for module in mlps:
                once.callback(module.register_forward_hook(lambda _m, _a, out: outputs.append(out)).remove)
            next_logits(adapter, ids)
        undo.enter_context(held_attention(adapter, model.trace))
        undo.enter_context(_holding(norms, scales))
        for module, out in zip(mlps, outputs, strict=True):
            undo.callback(module.register_forward_hook(lambda _m, _a, _o, out=out: out).remove)
        for index in range(adapter.n_layers):
            for part in ("gate_proj", "up_proj"):
                module = adapter.module(index, part) if part == "gate_proj" else getattr(mlps[index], "up_proj", None)
                if module is not None:
                    undo.callback(module.register_forward_hook(note((index, part))).remove)
        if added is not None:
            layer, position, vector = added

            def enter(_module, args, kwargs):
                x = args[0].clone()
                x[0, position] += vector
                return (x, *args[1:]), kwargs

            home = adapter.block(layer) if layer < adapter.n_layers else adapter.final_norm_module
            undo.callback(home.register_forward_pre_hook(enter, with_kwargs=True).remove)
        logits = next_logits(adapter, ids)[0]
    return found, logits


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_edges_between_tokens_and_neurons(name):
    """Without heads as nodes an edge is what the source adds to the reader's inputs, times the rule's coefficients."""
    dp = DePass(build_variant(name).double())
    graph = dp.graph(IDS, 7, nodes=12, kinds=["neurons"])
    base, logits = inputs_with(dp, graph)
    sources = [node for node in graph.nodes if node.kind == "neuron"][-4:]
    sources += [graph.nodes[1], graph.nodes[1 + len(IDS) // 2]]
    edges = {(edge.source, edge.target): edge.weight for edge in graph.edges}
    checked, wanted = 0, 0.0
    for source in sources:
        if source.kind == "token":
            place = 0, source.position, graph.model.trace.layers[0].resid_pre[source.position]
        else:
            place = source.layer + 1, source.position, graph.model.written(graph.model.seat(source.id))
        found, changed = inputs_with(dp, graph, place)
        cap = dp.adapter.cap_ratio(logits[None])[0, 7] if "caps" in name else 1.0
        if "caps" not in name:
            wanted = edges.get((source.id, "target"), 0.0)
            assert float((changed - logits)[7] * cap) == pytest.approx(wanted, rel=1e-5, abs=1e-8)
        for seat in graph.model.ways.seats:
            if seat.layer < place[0]:
                continue
            trace = graph.model.trace.layers[seat.layer].mlps[0]
            weights = dp.adapter.mlps(seat.layer)[0]
            shares = linear_shares("shapley", weights, trace, torch.tensor([seat.position]), torch.float64)
            at = seat.position, seat.index
            gate = (found[seat.layer, "gate_proj"] - base[seat.layer, "gate_proj"])[at]
            wanted = shares.gate[0, seat.index] * gate
            if shares.up is not None:
                up = (found[seat.layer, "up_proj"] - base[seat.layer, "up_proj"])[at]
                wanted = wanted + shares.up[0, seat.index] * up
            label = next(key for key, number in graph.model.seats.items() if graph.model.ways.seats[number] is seat)
            assert edges.get((source.id, label), 0.0) == pytest.approx(float(wanted), rel=1e-5, abs=1e-8)
            checked += 1
    assert checked > 8


@pytest.mark.parametrize("name", ["llama: GQA", "opt: stream norms, projected embedding", "qwen3_next", "gpt_oss"])
def test_an_edge_is_divided_by_heads_and_keys(name):
    dp = DePass(build_variant(name).double())
    graph = dp.graph(IDS, 7, nodes=16)
    heads = [node for node in graph.nodes if node.kind == "head"]
    several = 0
    for target in ["target", heads[0].id, heads[-1].id, *(n.id for n in graph.nodes if n.kind == "neuron")][:6]:
        for edge in graph.incoming(target)[:4]:
            if graph.node(edge.source).kind in ("others", "bias"):
                with pytest.raises(ValueError, match="is a sum of many"):
                    graph.divide(edge.source, target)
                continue
            parts = graph.divide(edge.source, target)
            assert sum(share for _, share in parts) == pytest.approx(edge.weight, rel=1e-9, abs=1e-12)
            several += len(parts) > 1
    assert several
    for head in heads:
        for edge in graph.incoming(head.id)[:3]:
            source = graph.node(edge.source)
            if source.kind not in ("token", "neuron", "head"):
                continue
            keys = graph.divide(source, head, by="key")
            assert sum(share for _, share in keys) == pytest.approx(edge.weight, rel=1e-9, abs=1e-12)
            assert all(source.position <= int(label.rpartition("@")[2]) <= head.position for label, _ in keys)


def test_what_is_direct_passes_no_head():
    """Direct in the first layer's neurons is what norm and weights make of the stream itself."""
    dp = DePass(build_variant("llama: GQA").double())
    graph = dp.graph(IDS, 7, nodes=400, kinds=["neurons"])
    number = next(i for i, seat in enumerate(graph.model.ways.seats) if seat.layer == 0)
    seat = graph.model.ways.seats[number]
    label = next(key for key, one in graph.model.seats.items() if one == number)
    record, weights = graph.model.trace.layers[0], dp.adapter.mlps(0)[0]
    shares = linear_shares("shapley", weights, record.mlps[0], torch.tensor([seat.position]), torch.float64)
    x = record.resid_pre[seat.position] * weights.norm.weight * weights.norm.scale(record.resid_mid[seat.position])
    gate, up = weights.w_gate[seat.index] @ x, weights.w_up[seat.index] @ x
    wanted = float(shares.gate[0, seat.index] * gate + shares.up[0, seat.index] * up)
    token = graph.nodes[1 + seat.position].id
    assert dict(graph.divide(token, label))["direct"] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
def test_features_are_nodes(site):
    """A feature's edges sum to its activation; with it as a node, shares still sum, and it is divided like others."""
    dp = DePass(build_variant("llama: biases").double())
    sae = Dictionary(dtype=torch.float64)
    kinds = [Features(1, sae, site)]
    graph = dp.graph(IDS, 7, nodes=60, features=kinds)
    features = [node for node in graph.nodes if node.kind == "feature"]
    assert features and graph.completeness_error < 1e-12
    by_label = {label: score for label, score in zip(*_scores(dp.ledger(IDS, 7), kinds[0]), strict=True)}
    alone = dp.graph(IDS, 7, nodes=10_000, kinds=[], features=kinds)
    sums = {}
    for node in alone.nodes:
        if node.kind == "feature":
            sums[node.label] = sums.get(node.label, 0.0) + node.share
            assert sum(edge.weight for edge in alone.incoming(node)) == pytest.approx(node.activation, rel=1e-9)
            x = _stream(alone, site)[node.position]
            assert sae.encode(x[None, None])[0, 0, node.index] == pytest.approx(node.activation, rel=1e-6)
    assert sums.keys() <= by_label.keys()
    assert all(sums[label] == pytest.approx(by_label[label], rel=1e-5, abs=1e-7) for label in sums)
    for edge in [edge for edge in graph.edges if edge.target == features[0].id and edge.source[0] != "o"][:3]:
        if edge.source != "bias":
            parts = graph.divide(edge.source, edge.target)
            assert sum(share for _, share in parts) == pytest.approx(edge.weight, rel=1e-6, abs=1e-12)


def _scores(ledger, kind):
    found = ledger.scores(kind)
    return found.labels, found.scores.tolist()


def _stream(graph, site):
    trace = graph.model.trace
    return trace.resid_at(1, site)
