"""The call of :class:`depass_fast.DePass` that tells everything about one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .calls import Calls
from .components.features import Features
from .inputs.prompts import OnePrompt
from .ledger.book import Ledger
from .methods.report import report_of
from .options import LinearRuleName, OptionValues
from .report.document import Report
from .trace.record import Trace

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ReportCalls(Calls):
    """A report, which is a page to look at (docs/report.md)."""

    if TYPE_CHECKING:

        def trace(self, prompt: Any, **options: Any) -> Trace: ...

        def ledger(self, prompt: Any, target: Any = None, **more: Any) -> Ledger: ...

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
            target, rule, contrast, position: as for :meth:`depass_fast.DePass.ledger`. Every target at every position
                has a sheet of its own.
            features: those of a dictionary are shown, too.
            options: overrides of :class:`depass_fast.Options`.

        Raises:
            ValueError, TypeError: as :meth:`depass_fast.DePass.ledger`; several prompts.
            MemoryError: it cannot fit.
        """
        trace = prompt if isinstance(prompt, Trace) else self.trace(prompt, **options)
        if trace.batch or trace.n_prompts != 1:
            raise ValueError("prompt: a report is of one prompt; call report for each.")
        options.pop("chat_template_kwargs", None)  # which only the trace needed
        ledger = self.ledger(trace, target, rule=rule, contrast=contrast, position=position, **options)
        return report_of(self.adapter, ledger, trace, features)
