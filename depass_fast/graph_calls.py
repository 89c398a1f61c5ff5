"""The call of :class:`depass_fast.DePass` that makes graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from .calls import Calls
from .chosen_method import with_method
from .components.features import Features
from .components.model import Tokens
from .graph.build import graph_of
from .graph.dictionaries import kinds_of
from .graph.graph import Graph
from .inputs.prompts import Prompt
from .ledger.given import check_options, refuse_arguments, rule_of
from .options import LinearRuleName, OptionValues
from .request import with_targets
from .runtime.numbers import as_index
from .trace.record import Trace

if TYPE_CHECKING:
    from typing_extensions import Unpack

NodeKind = Literal["heads", "neurons"]
NODE_KINDS = ("heads", "neurons")
MOST = 10_000  # nodes


class GraphCalls(Calls):
    """Graphs of the nodes by way of which a target comes about."""

    @torch.no_grad()
    def graph(
        self,
        prompt: Prompt | Trace,
        target: Any = None,
        *,
        rule: LinearRuleName | None = None,
        nodes: int = 200,
        kinds: Sequence[NodeKind] = NODE_KINDS,
        features: Features | Sequence[Features] | None = None,
        contrast: int | str | None = None,
        position: int = -1,
        **options: Unpack[OptionValues],
    ) -> Graph:
        """Return the graph of direct shares between the leading nodes of one prompt (docs/graph.md).

        One forward and one backward pass find the nodes with the largest shares in the target, each a head, a neuron or
        a feature at a position. A backward pass from each, many at once, gives its edges. Every node's edges sum to its
        activation.

        Args:
            prompt: one prompt, as for :meth:`depass_fast.DePass.attribute`.
            target, contrast: one target, as there. For circuits of neurons and heads read `LogProb`, or a contrast.
            rule: "shapley", "half" or "taylor"; None as for :meth:`depass_fast.DePass.ledger`.
            nodes: how many heads, neurons and features are kept, 1 to 10,000, beside all tokens and the target.
            kinds: which of "heads" and "neurons" may be nodes. Heads that are none are part of the edges.
            features: dictionaries of the residual stream, whose features may be nodes, too:
                :class:`depass_fast.Features` of one layer or several, or a list of them. A gradient must go through
                their encoders.
            position: where the target is read, -N to N - 1.
            options: overrides of :class:`depass_fast.Options`.

        Raises:
            ValueError, TypeError: bad input, before any work: several prompts, positions or targets, unknown kinds, two
                dictionaries at one place, a rule that is not linear, a model that graphs do not know.
            MemoryError: it cannot fit.
        """
        refuse_arguments(options)
        self.adapter.check_one_norm("model: a graph")
        settings = self.options.updated(options)
        check_options(settings)
        if isinstance(kinds, str) or any(kind not in NODE_KINDS for kind in kinds):
            raise ValueError(f"kinds: expected a list of {', '.join(map(repr, NODE_KINDS))}, got {kinds!r}.")
        if not 1 <= as_index(nodes, "nodes") <= MOST:
            raise ValueError(f"nodes: {nodes} is out of range; it must be from 1 to {MOST}: every pair has a number.")
        dictionaries, position = kinds_of(features), as_index(position, "position")
        if not kinds and not dictionaries:
            raise ValueError("kinds: with none of them, features must be given.")
        given: OptionValues = {**options, "allocation": rule_of(rule, settings), "shard": None}
        request = self._request(prompt, Tokens(), None, given)
        if len(request.prompts) != 1:
            raise ValueError(f"prompt: a graph is of one prompt, got {len(request.prompts)}; make one of each.")
        for kind in dictionaries:
            kind.check(self.adapter, [len(request.prompts[0])])
        request = with_targets(request, target, contrast=contrast, position=position)
        if len(request.targets[0].items) != 1:
            raise ValueError("target: a graph is of one target; make one of each.")
        return graph_of(with_method(request, "adjoint"), tuple(kinds), dictionaries, as_index(nodes, "nodes"))
