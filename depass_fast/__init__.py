"""depass_fast: exact decomposed forward passes (DePass) through Hugging Face causal language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .components import ComponentKind, Heads, Modules, Neurons, Tokens
    from .engine import DePass
    from .features import Features
    from .focus import Focus, Partition
    from .generation import Generation
    from .given import Custom, Subspaces
    from .layered import LayeredAttribution
    from .options import Options
    from .planner import Plan
    from .result import Attribution
    from .state import ComponentState
    from .trace import Trace
    from .trace_size import trace_nbytes
    from .verify import Verification, VerificationWarning

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "ComponentKind",
    "ComponentState",
    "Custom",
    "DePass",
    "Features",
    "Focus",
    "Generation",
    "Heads",
    "LayeredAttribution",
    "Modules",
    "Neurons",
    "Options",
    "Partition",
    "Plan",
    "Subspaces",
    "Tokens",
    "Trace",
    "Verification",
    "VerificationWarning",
    "__version__",
    "trace_nbytes",
]

# Imported on first use: torch and transformers take seconds, which `depass-fast --help` need not wait for.
_HOME = {
    **dict.fromkeys(("ComponentKind", "Heads", "Modules", "Neurons", "Tokens"), "components"),
    **dict.fromkeys(("Custom", "Subspaces"), "given"),
    "Attribution": "result",
    "ComponentState": "state",
    "DePass": "engine",
    "Features": "features",
    "Focus": "focus",
    "Generation": "generation",
    "LayeredAttribution": "layered",
    "Options": "options",
    "Partition": "focus",
    "Plan": "planner",
    "Trace": "trace",
    "trace_nbytes": "trace_size",
    **dict.fromkeys(("Verification", "VerificationWarning"), "verify"),
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
