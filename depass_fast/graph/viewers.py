"""Graphs as circuit-tracer's and Neuronpedia's viewers read them (docs/graph.md)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..labels import shown_tokens
from ..version import __version__
from .influence import cumulative
from .seats import HEAD

if TYPE_CHECKING:
    from .record import DirectShares, Node, Place

# what the viewers draw, in this order: a square, a dot, a triangle (a dot in circuit-tracer's), a diamond, a plus
TYPES = {
    "token": "embedding",
    "target": "logit",
    "neuron": "cross layer transcoder",
    "feature": "cross layer transcoder",
    "head": "lorsa",
    "others": "mlp reconstruction error",
    "bias": "bias",
}
_EXPERT, _DICTIONARY, _HEAD, _OTHERS, _BIAS = 1 << 15, 1 << 23, 1 << 24, 1 << 25, 1 << 26  # of the numbers in a layer
_SHOWN = str.maketrans({"\n": "⏎", "\t": "→", "\r": "↵"})


def document(graph: DirectShares, slug: str | None, scan: str | None) -> dict[str, Any]:
    """Return a graph as plain values in the viewers' schema. Nodes and links are those of the graph."""
    named = list(_named(graph))
    ids = {node.id: given["node_id"] for node, given in named}
    links = [{"source": ids[edge.source], "target": ids[edge.target], "weight": edge.weight} for edge in graph.edges]
    generator = {"name": "depass_fast", "version": __version__}
    metadata = {
        "slug": slug or _slug(graph),
        "scan": scan or graph.provenance.name or graph.provenance.model_type,
        "transcoder_list": [],
        "prompt_tokens": [token.translate(_SHOWN) for token in shown_tokens(graph.tokens)],
        "prompt": graph.prompt,
        "node_threshold": 1.0,
        "schema_version": 1,
        "info": {"description": _description(graph), "generator": generator},
        "generation_settings": {
            "rule": graph.rule,
            "target": graph.target_name,
            "position": graph.position,
            "nodes": len(graph.seats),
            "completeness_error": graph.completeness_error,
        },
        "pruning_settings": dict(graph.pruning),
    }
    view = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": view, "nodes": [given for _, given in named], "links": links}


def _named(graph: DirectShares) -> Iterator[tuple[Node, dict[str, Any]]]:
    """Yield every node beside what stands for it."""
    target, *nodes = graph.nodes
    places: list[Place] = [*graph.token_places, *graph.seats]
    levels = cumulative(np.array([node.influence for node in nodes])).clip(max=1.0).tolist()
    yield target, _target(graph)
    for number, (node, level) in enumerate(zip(nodes, levels, strict=True)):
        layer, position = node.layer or 0, node.position or 0
        if node.kind == "token":
            name, index, label = "E", position, f"{_text(graph, position)}@{position}"
            ids = {"node_id": f"E_{node.index}_{position}", "jsNodeId": f"E_{node.index}-{position}"}
        else:
            if node.kind == "others":
                layer = max(graph.n_layers - 1, 1) if node.layer is None else layer
                index, label = _OTHERS + number, f"pruned, into {node.label.removeprefix('others of ')}"
            else:
                index = _BIAS if node.kind == "bias" else _number(places[number])
                label = node.label if node.kind == "bias" else f"{node.label} at {_text(graph, position)}"
            name, paired = str(layer), _paired(layer, index)
            ids = {"node_id": f"{layer}_{index}_{position}", "jsNodeId": f"{layer}_{index}-0"}
            index = paired
        yield node, _node(node, ids, name, index, position, label, level)


def _node(
    node: Node, ids: dict[str, str], layer: str, feature: int, position: int, label: str, level: float | None
) -> dict[str, Any]:
    return {
        **ids,
        "feature": feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": TYPES[node.kind],
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": label,
        "influence": level,
        "activation": node.activation,
    }


def _target(graph: DirectShares) -> dict[str, Any]:
    token, contrast = graph.target_ids
    probability = graph.probability or 0.0
    text = graph.target_name if contrast is not None else graph.target_text or graph.target_name
    layer = graph.n_layers + 1
    index = -1 if token is None else token
    ids = {"node_id": f"{layer}_{index}_{graph.position}", "jsNodeId": f"L_{index}-{graph.position}"}
    # viewers read the probability from behind "(p=", and the token from between the quotes
    label = f'Output "{text.translate(_SHOWN)}" (p={probability:.3f})'
    given = _node(graph.nodes[0], ids, str(layer), index, graph.position, label, None)
    return given | {"token_prob": probability, "is_target_logit": True}


def _number(place: Place) -> int:
    """Return a number of a head, a neuron or a feature that no other of its layer has."""
    if place.kind == HEAD:
        return _HEAD + place.index
    return place.part * _EXPERT + place.index if place.kind == "neuron" else _DICTIONARY + place.index


def _paired(layer: int, index: int) -> int:
    """Return Cantor's number of a layer and an index, which files of version 1 have in the place of a feature's own."""
    return (layer + index) * (layer + index + 1) // 2 + index


def _text(graph: DirectShares, position: int) -> str:
    return repr(shown_tokens(graph.tokens)[position].translate(_SHOWN))


def _slug(graph: DirectShares) -> str:
    """Return a name for files and addresses, of the last words of the prompt and of the target."""
    words = re.findall(r"[a-z0-9]+", f"{graph.prompt[-60:]} {graph.target_name}".lower())
    return "-".join(words[-10:]) or "graph"


def _description(graph: DirectShares) -> str:
    return (
        f"Direct shares under the rule {graph.rule!r}: every node's incoming links sum to its activation. A diamond is "
        "what neurons that are no nodes give to one node; a triangle is an attention head, whose activation is its "
        f"share in {graph.target_name}."
    )
