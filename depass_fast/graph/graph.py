"""A graph of direct shares: its files, its edges divided, and interventions on its nodes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..report.document import Report
from ..report.fragment import fragment
from ..report.sheet import Sheet
from ..runtime.paths import check_path
from .divide import by_head, by_key
from .intervene import Intervention, intervened
from .page import sheet_of
from .record import DirectShares, Node
from .viewers import document


class Graph(DirectShares):
    """Tokens, heads, neurons and features of one prompt, and the direct shares between them under a linear rule.

    The incoming edges of every node sum to its activation: what of a node's input comes from neurons that are no nodes
    is an edge from `others`, what comes from biases is one from `bias` (docs/graph.md).

    ``prompt`` is the text, as its tokens put together; ``input_ids`` and ``tokens`` are those up to the position that
    is read. ``target_name``, ``target_kind``, ``target_ids`` and ``position`` say what is read, and where:
    ``target_ids`` holds the token and the one that is subtracted, None where there is none. ``probability`` is that of
    the target's token, None for a vector. ``constants`` is what constants give to the target by all ways. ``rule`` is
    "shapley", "half" or "taylor". ``errors`` (R,) are how far the incoming edges of the target and of every kept node
    are off its activation, relative to the sum of their sizes; ``completeness_error`` is the largest. ``seconds`` is
    how long it took.
    """

    def divide(
        self, source: str | Node, target: str | Node, by: Literal["head", "key"] = "head"
    ) -> list[tuple[str, float]]:
        """Return an edge as a sum of labelled shares.

        By "head": "direct" is what comes through the residual stream alone; the rest is told apart by the first head
        that it passes behind the source, in whatever layer, at whatever positions. Heads that are nodes have edges of
        their own, and none here. By "key", for a head as the target: by the positions where this head reads.

        Raises:
            KeyError: no such node.
            ValueError: an edge from `others` or `bias`; a target that nothing comes into; "key" for another target than
                a head; another word; weights that have changed since.
        """
        ways = {"head": by_head, "key": by_key}
        if by not in ways:
            raise ValueError(f"by: {by!r} is not one of 'head', 'key'.")
        return ways[by](self, self.node(source), self.node(target))

    def to_json(self, *, slug: str | None = None, scan: str | None = None) -> dict[str, Any]:
        """Return the graph as circuit-tracer's and Neuronpedia's viewers read it: plain values, for `json.dump`.

        ``slug`` names the graph, by default after its prompt and target. ``scan`` names the model, by default as its
        provenance does, without folders. docs/graph.md says what stands for what.
        """
        return document(self, slug, scan)

    def save(self, path: str | Path, *, slug: str | None = None, scan: str | None = None) -> None:
        """Write :meth:`to_json` to a file.

        Raises:
            OSError: there is no such folder (FileNotFoundError), or the file cannot be written.
        """
        check_path(path)
        text = json.dumps(self.to_json(slug=slug, scan=scan), allow_nan=False, separators=(",", ":"))
        Path(path).write_text(text, encoding="utf-8")

    @property
    def sheets(self) -> list[Sheet]:
        """The sheets that :func:`depass_fast.write_html` shows of the graph: one."""
        return [sheet_of(self)]

    def to_html(self, path: str | Path) -> None:
        """Write a page that draws the graph: one HTML file that works without a network (docs/report.md).

        It holds the 1,000 nodes and the 80,000 edges of the largest influence; what is left out is in the sums.

        Raises:
            ImportError: a package of the extra ``report`` is not installed.
            OSError: there is no such folder (FileNotFoundError), or the file cannot be written.
        """
        check_path(path)
        Report(self.sheets, str(self)).to_html(path)

    def _repr_html_(self) -> str | None:
        """Return a small picture without scripts: the tokens, and what the target reads. None where there is none."""
        with contextlib.suppress(Exception):  # a repr never fails
            return fragment(self.sheets)
        return None

    def intervene(
        self,
        node: str | Node,
        *,
        scale: float | None = None,
        value: float | None = None,
        hold: Sequence[Literal["attention", "norms"]] = (),
    ) -> Intervention:
        """Run the model with one node's activation changed, and compare the effect with the predicted one.

        ``predicted`` is (new / old activation - 1) · the node's share in the target: with norms, attention and the
        rule's coefficients as they were. ``actual`` is what the model itself does then.

        Args:
            node: the id of a token, a head, a neuron or a feature.
            scale: a factor of its activation; 0.0, the default, takes the node out.
            value: the new activation, in the place of ``scale``.
            hold: what stays as it was in the model, too: "attention" (its probabilities), "norms" (their scales).

        Raises:
            KeyError: no such node.
            ValueError: a node that cannot be changed; both ``scale`` and ``value``, or one that is no finite number,
                or so large that the model gives no finite target; weights that have changed since.
        """
        return intervened(self, self.node(node), scale, value, hold)
