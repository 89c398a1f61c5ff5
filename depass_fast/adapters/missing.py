"""The modules that a family declares and a model of it, a fork, may lack."""

from __future__ import annotations

from .adapter import Adapter
from .family import Path
from .paths import exists, name_of

_OF_THE_MODEL = ("layers", "embedding", "final_norm", "unembedding", "project_out", "head")
_OF_A_LAYER = ("attention", "v_proj", "v_entries", "v_norm", "v_up", "o_front", "o_proj", "mlp")
_OF_AN_MLP = ("gate_proj", "down_proj")
_NORMS = [f"{branch}{kind}" for branch in ("attention", "mlp") for kind in ("_norm", "_output_norm", "_stream_norm")]


def missing_path(adapter: Adapter) -> str | None:
    """The path of a module that the family declares and this model lacks, or None.

    Up projections and activations are not looked for: most rules do without.
    """
    for part in _OF_THE_MODEL:
        path: Path | None = getattr(adapter.family, part)
        if path is not None and not exists(adapter.model, path):
            return name_of(path)
    for index in range(adapter.n_layers):
        for part in [*_OF_A_LAYER, *_NORMS, *([] if adapter.is_mixture(index) else _OF_AN_MLP)]:
            if not adapter.has_part(index, part):
                continue
            try:
                adapter.module(index, part)
            except AttributeError:
                return adapter.path(index, part)
    return None
