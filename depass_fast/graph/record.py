"""Nodes and direct shares: tables of them, what leads to what, and pruning."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ..results.provenance import Provenance
from ..results.tables import data_frame
from ..runtime.terminal import encodable
from .influence import BIAS, OTHERS, Matrix, influence, leading_paths, pruned
from .seats import FEATURE, HEAD, NEURON

if TYPE_CHECKING:
    import pandas
    from typing_extensions import Self

    from .model import GraphModel

TARGET, TOKEN, OTHER, CONSTANT = "target", "token", "others", "bias"
_SHOWN = 5  # paths


class Node(NamedTuple):
    """A node of a graph.

    id: its label and position, such as `L3N512@7`; "target", "bias", or "others of L3N512@7".
    kind: "token", "head", "neuron", "feature", "others", "bias" or "target".
    layer, index, position: where it is; None where there is no such thing. ``index`` is that of the head, of the neuron
        in its MLP, of the feature in its dictionary, and a token's id.
    activation: what its incoming edges sum to: a neuron's and a feature's activation, a head's share in the target, the
        target itself. None for what no edge comes into.
    share: its share in the target by all ways, as a ledger has it: exact. None for `others` and `bias`.
    influence: the fraction of the target's influence that passes it, 0 to 1 (docs/graph.md).
    """

    id: str
    kind: str
    label: str
    layer: int | None
    index: int | None
    position: int | None
    activation: float | None
    share: float | None
    influence: float


class Edge(NamedTuple):
    """A direct share: ``weight`` of the activation of ``target`` comes from ``source``, both ids of nodes."""

    source: str
    target: str
    weight: float


class GraphPath(NamedTuple):
    """A path from a token to the target: its nodes' ids, and the product of its edges' fractions, 0 to 1."""

    nodes: tuple[str, ...]
    strength: float


@dataclass(frozen=True)
class Place:
    """A token or a seat as nodes have it: the first five fields of :class:`Node` behind its id, and its share."""

    kind: str
    label: str
    layer: int | None
    index: int
    position: int
    share: float
    part: int = 0  # the number of the MLP in its layer, or of the dictionary

    @property
    def id(self) -> str:
        return self.label if self.kind == TOKEN else f"{self.label}@{self.position}"


@dataclass(frozen=True, eq=False)
class DirectShares:
    """The numbers of a :class:`depass_fast.Graph`, whose fields are these, and the tables made of them.

    shares: (R, S) direct shares; the rows are the target and the kept nodes, the columns the tokens, the kept nodes,
        `others` and `bias`. activations: (R,) what the rows sum to. constants: what constants give to the target by all
        ways; with the tokens' shares it sums to the target.
    """

    shares: Matrix
    activations: Matrix
    errors: Matrix
    token_places: tuple[Place, ...]
    seats: tuple[Place, ...]
    prompt: str
    input_ids: list[int]
    tokens: list[str]
    target_name: str
    target_kind: str
    target_ids: tuple[int | None, int | None]
    target_text: str | None
    probability: float | None
    position: int
    rule: str
    n_layers: int
    seconds: float
    provenance: Provenance
    warnings: list[str] = field(default_factory=list)
    pruning: dict[str, float] = field(default_factory=dict)
    constants: float = 0.0
    model: GraphModel | None = None

    @property
    def completeness_error(self) -> float:
        """The largest relative error of a node's sum."""
        return float(self.errors.max())

    # -- tables -----------------------------------------------------------------------------------------------------

    @cached_property
    def nodes(self) -> list[Node]:
        """The target, the tokens, the kept nodes from the last layer to the first, `others` of each, and `bias`."""
        found = influence(self.shares, len(self.tokens))
        target = Node(
            "target",
            TARGET,
            self.target_name,
            None,
            self.target_ids[0],
            self.position,
            float(self.activations[0]),
            float(self.activations[0]),
            1.0,
        )
        nodes = [target]
        for column, place in enumerate([*self.token_places, *self.seats]):
            row = column - len(self.tokens) + 1
            activation = float(self.activations[row]) if row > 0 else None
            given = (place.kind, place.label, place.layer, place.index, place.position, activation, place.share)
            nodes.append(Node(place.id, *given, float(found.columns[column])))
        for row, read_by in enumerate([target, *nodes[1 + len(self.tokens) :]]):
            if self.shares[row, OTHERS]:
                name = f"others of {read_by.id}"
                place = (read_by.layer, None, read_by.position)
                nodes.append(Node(name, OTHER, name, *place, None, None, float(found.others[row])))
        if self.shares[:, BIAS].any():
            nodes.append(Node("bias", CONSTANT, "bias", None, None, None, None, None, float(found.columns[BIAS])))
        return nodes

    @cached_property
    def edges(self) -> list[Edge]:
        """All edges but those of weight zero, by the node that they come into."""
        ids = [place.id for place in (*self.token_places, *self.seats)]
        edges = []
        for row, read_by in enumerate(["target", *ids[len(self.tokens) :]]):
            for column in np.flatnonzero(self.shares[row]).tolist():
                source = ids[column] if column < len(ids) else "bias" if column > len(ids) else f"others of {read_by}"
                edges.append(Edge(source, read_by, float(self.shares[row, column])))
        return edges

    @cached_property
    def _by_id(self) -> dict[str, Node]:
        return {node.id: node for node in self.nodes}

    def node(self, node: str | Node) -> Node:
        """Return a node by its id. Raises KeyError for none, and names those that begin alike."""
        name = node.id if isinstance(node, Node) else node
        if name in self._by_id:
            return self._by_id[name]
        alike = [one for one in self._by_id if one.startswith(str(name).split("@")[0])][:5]
        hint = f" there are {', '.join(alike)}" if alike else " graph.nodes lists all."
        raise KeyError(f"node: {name!r} is none of this graph;{hint}")

    def incoming(self, node: str | Node) -> list[Edge]:
        """Return the edges into a node, the largest first. Their weights sum to its activation. KeyError for none."""
        name = self.node(node).id
        return sorted((edge for edge in self.edges if edge.target == name), key=lambda edge: -abs(edge.weight))

    def outgoing(self, node: str | Node) -> list[Edge]:
        """Return the edges out of a node, those that are most of what is read first. KeyError for an unknown node."""
        name = self.node(node).id
        sizes = {node.id: float(size) for node, size in zip(self._readers, np.abs(self.shares).sum(1), strict=True)}
        mine = (edge for edge in self.edges if edge.source == name)
        return sorted(mine, key=lambda edge: -abs(edge.weight) / sizes[edge.target])

    @property
    def _readers(self) -> list[Node]:
        return [self.nodes[0], *self.nodes[1 + len(self.tokens) :][: len(self.seats)]]

    def paths(self, k: int = _SHOWN) -> list[GraphPath]:
        """Return the ``k`` paths from a token to the target with the largest products of fractions, the largest first.

        An edge's fraction is its |weight| over the sum of those that come into the same node.
        """
        ids = [place.id for place in (*self.token_places, *self.seats)]
        found = leading_paths(self.shares, len(self.tokens), k)
        return [GraphPath((*(ids[column] for column in columns), "target"), strength) for strength, columns in found]

    def to_dataframe(self, table: Literal["nodes", "edges"] = "edges") -> pandas.DataFrame:
        """Return the nodes or the edges as a DataFrame. Needs pandas.

        Raises:
            ValueError: ``table`` is another word.
            ImportError: pandas is not installed.
        """
        if table not in ("nodes", "edges"):
            raise ValueError(f"table: {table!r} is not one of 'nodes', 'edges'.")
        kind, rows = (Node, self.nodes) if table == "nodes" else (Edge, self.edges)
        return data_frame(kind._fields, rows, self.how())

    def how(self) -> dict[str, Any]:
        """Return plain values that say what the graph is of, and how it was computed."""
        names = ("prompt", "target_name", "target_kind", "position", "rule", "completeness_error", "seconds")
        return {name: getattr(self, name) for name in names} | dict(self.pruning) | {"model": str(self.provenance)}

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Self:
        """Return the graph without nodes and edges of little influence, as circuit-tracer prunes.

        The nodes of the largest influence stay, until they have ``node_threshold`` of that of all nodes; then the edges
        until they have ``edge_threshold`` of that of all edges. Tokens stay. What is cut goes to `others` of the node
        that it came into: all sums stay as they are.

        Raises:
            ValueError: a threshold is not within 0 to 1.
        """
        for name, given in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
            if not 0 <= given <= 1:
                raise ValueError(f"{name}: {given} is out of range; it must be from 0 to 1.")
        shares, kept = pruned(self.shares, len(self.tokens), node_threshold, edge_threshold)
        return replace(
            self,
            shares=shares,
            activations=self.activations[kept],
            errors=self.errors[kept],
            seats=tuple(seat for seat, stays in zip(self.seats, kept[1:], strict=True) if stays),
            pruning={"node_threshold": node_threshold, "edge_threshold": edge_threshold},
        )

    def __repr__(self) -> str:
        counts = {kind: sum(seat.kind == kind for seat in self.seats) for kind in (HEAD, NEURON, FEATURE)}
        named = ", ".join(f"{count} {kind}s" for kind, count in counts.items() if count)
        edges = int(np.count_nonzero(self.shares))
        lead = " | ".join(" > ".join(path.nodes) for path in self.paths(1))
        parts = f"{len(self.tokens)} tokens, {named}, {edges:,} edges, {self.rule}"
        return encodable(
            f"{type(self).__name__}({self.target_name}, {parts}, completeness error {self.completeness_error:.1e}"
            f"{'; ' + lead if lead else ''})"
        )

    def __str__(self) -> str:
        lines = [f"{self.target_name} at position {self.position}: {self.activations[0]:.4f}"]
        lines.append(f"graph | {self.rule} | completeness error {self.completeness_error:.1e} | {self.seconds:.2f} s")
        lines += ["", "leading paths"]
        for path in self.paths(_SHOWN):
            lines.append(f"  {100 * path.strength:6.2f} %  {' > '.join(path.nodes)}")
        leading = sorted(self.nodes[1 + len(self.tokens) :][: len(self.seats)], key=lambda node: -node.influence)
        lines += ["", "leading nodes"]
        for node in leading[:_SHOWN]:
            lines.append(f"  {node.id:14} influence {node.influence:.3f}  share {node.share:+.4f}")
        return encodable("\n".join(lines))
