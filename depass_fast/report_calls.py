"""The call of :class:`depass_fast.DePass` that tells everything about one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .calls import Calls
from .components.features import Features
from .graph.graph import Graph
from .graph.page import view_of
from .graph_calls import MOST
from .inputs.prompts import OnePrompt
from .ledger.book import Ledger
from .methods.report import report_of
from .options import LinearRuleName, OptionValues
from .report.document import Report
from .runtime.numbers import as_index
from .trace.record import Trace

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ReportCalls(Calls):
    """A report, which is a page to look at (docs/report.md)."""

    if TYPE_CHECKING:

        def trace(self, prompt: Any, **options: Any) -> Trace: ...

        def ledger(self, prompt: Any, target: Any = None, **more: Any) -> Ledger: ...

        def graph(self, prompt: Any, target: Any = None, **more: Any) -> Graph: ...

    @torch.no_grad()
    def report(
        self,
        prompt: OnePrompt | Trace,
        target: Any = None,
        *,
        rule: LinearRuleName | None = None,
        contrast: int | str | None = None,
        position: int | Sequence[int] = -1,
        features: Features | None = None,
        graph: bool | int = False,
        **options: Unpack[OptionValues],
    ) -> Report:
        """Return everything about one prompt, to be looked at: ``report.to_html("why.html")``.

        It holds the shares of all tokens; of attention and MLP of every layer at every position; of all heads, with
        where each writes and what it carries; of the leading neurons, with where each is active and what wrote what it
        reads. Of layers that it does not know as well (Gemma 4) it shows what a ledger does, and says
        so. All are exact under a linear rule: they come from a ledger (:meth:`depass_fast.DePass.ledger`), by one
        forward and one backward pass, and each view's rows sum to the target.

        Args:
            prompt: one, as for :meth:`depass_fast.DePass.attribute`; or the trace of one.
            target, position: as for :meth:`depass_fast.DePass.ledger`. Every target at every position has a sheet of
                its own.
            rule, contrast: as for :meth:`depass_fast.DePass.ledger`.
            features: those of a dictionary are shown, too.
            graph: draw a graph (:meth:`depass_fast.DePass.graph`), too: True for one of 200 nodes, or how many. A graph
                is of one target at one position.
            options: overrides of :class:`depass_fast.Options`.

        Raises:
            ValueError, TypeError: as :meth:`depass_fast.DePass.ledger`; several prompts.
            MemoryError: it cannot fit.
        """
        if not isinstance(graph, bool) and not 1 <= as_index(graph, "graph") <= MOST:
            raise ValueError(f"graph: expected True, False, or how many nodes, 1 to {MOST}; got {graph}.")
        if graph is not False and not isinstance(position, int):
            raise ValueError("graph: it is of one position; make a report of each.")
        trace = prompt if isinstance(prompt, Trace) else self.trace(prompt, **options)
        if trace.batch or trace.n_prompts != 1:
            raise ValueError("prompt: a report is of one prompt; call report for each.")
        options.pop("chat_template_kwargs", None)  # which only the trace needed
        given: dict[str, Any] = {"rule": rule, "contrast": contrast, "position": position, **options}
        made = None
        if graph is not False:
            count = {} if graph is True else {"nodes": graph}
            made = self.graph(trace, target, features=features, **count, **given)
        report = report_of(self.adapter, self.ledger(trace, target, **given), trace, features)
        if made is not None:
            (sheet,) = report.sheets
            sheet.views.insert(-1, view_of(made, sheet.unit))
            sheet.warnings = list(dict.fromkeys([*sheet.warnings, *made.warnings]))
        return report
