"""depass_fast: exact decomposed forward passes (DePass) through Hugging Face causal language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .runtime.versions import check_transformers
from .version import __version__

if TYPE_CHECKING:
    from .components.base import ComponentKind
    from .components.custom import Custom, Subspaces
    from .components.features import Features
    from .components.model import Heads, Modules, Neurons, Tokens
    from .engine import DePass
    from .evaluate.interventions import masked_logits
    from .graph.graph import Graph
    from .graph.intervene import Intervention
    from .inputs.continuation import TokenBoundaryWarning
    from .inputs.doubts import InputWarning
    from .inputs.loading import WeightsWarning
    from .inputs.prompt_set import PromptSet
    from .inputs.targets import Contrast, LogProb
    from .ledger.book import Ledger
    from .methods.focus import Focus, Partition
    from .options import Adjoint, Options
    from .planning.plan import Plan
    from .report.document import Report
    from .results.attribution import Attribution
    from .results.completeness import CompletenessWarning
    from .results.continuation import Continuation
    from .results.credit import AttentionCredit
    from .results.estimate import ApproximationWarning, Estimate
    from .results.explanation import AttentionExplanation, Pair
    from .results.generation import Generation
    from .results.html import write_html
    from .results.layered import LayeredAttribution
    from .results.provenance import Provenance
    from .results.verification import Verification, VerificationWarning
    from .state.state import ComponentState
    from .sweep.failed import FailedPrompt
    from .sweep.opened import Sweep
    from .trace.record import Trace
    from .trace.size import trace_nbytes

__all__ = [
    "Adjoint",
    "ApproximationWarning",
    "AttentionCredit",
    "AttentionExplanation",
    "Attribution",
    "CompletenessWarning",
    "ComponentKind",
    "ComponentState",
    "Continuation",
    "Contrast",
    "Custom",
    "DePass",
    "Estimate",
    "FailedPrompt",
    "Features",
    "Focus",
    "Generation",
    "Graph",
    "Heads",
    "InputWarning",
    "Intervention",
    "LayeredAttribution",
    "Ledger",
    "LogProb",
    "Modules",
    "Neurons",
    "Options",
    "Pair",
    "Partition",
    "Plan",
    "PromptSet",
    "Provenance",
    "Report",
    "Subspaces",
    "Sweep",
    "TokenBoundaryWarning",
    "Tokens",
    "Trace",
    "Verification",
    "VerificationWarning",
    "WeightsWarning",
    "__version__",
    "masked_logits",
    "trace_nbytes",
    "write_html",
]

# Imported on first use: torch and transformers take seconds, which `depass-fast --help` need not wait for.
_HOMES = {
    "components.base": ("ComponentKind",),
    "components.features": ("Features",),
    "components.custom": ("Custom", "Subspaces"),
    "components.model": ("Heads", "Modules", "Neurons", "Tokens"),
    "engine": ("DePass",),
    "evaluate.interventions": ("masked_logits",),
    "graph.graph": ("Graph",),
    "graph.intervene": ("Intervention",),
    "inputs.continuation": ("TokenBoundaryWarning",),
    "inputs.doubts": ("InputWarning",),
    "inputs.loading": ("WeightsWarning",),
    "inputs.prompt_set": ("PromptSet",),
    "ledger.book": ("Ledger",),
    "inputs.targets": ("Contrast", "LogProb"),
    "methods.focus": ("Focus", "Partition"),
    "options": ("Adjoint", "Options"),
    "planning.plan": ("Plan",),
    "results.attribution": ("Attribution",),
    "results.completeness": ("CompletenessWarning",),
    "results.continuation": ("Continuation",),
    "results.credit": ("AttentionCredit",),
    "results.estimate": ("ApproximationWarning", "Estimate"),
    "results.explanation": ("AttentionExplanation", "Pair"),
    "report.document": ("Report",),
    "results.generation": ("Generation",),
    "results.html": ("write_html",),
    "results.layered": ("LayeredAttribution",),
    "results.provenance": ("Provenance",),
    "results.verification": ("Verification", "VerificationWarning"),
    "state.state": ("ComponentState",),
    "sweep.failed": ("FailedPrompt",),
    "sweep.opened": ("Sweep",),
    "trace.record": ("Trace",),
    "trace.size": ("trace_nbytes",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_transformers()
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
