"""Variants of families with sparse attention: their indexers select fewer keys than prompts have."""

from __future__ import annotations

from typing import Any

from tests.support.family_shapes import GROUPED, LATENT

_SPARSE = {**LATENT, **GROUPED, "index_topk": 3, "index_n_heads": 2, "index_head_dim": 6}

SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v32": ("deepseek_v32", _SPARSE),
    "glm_moe_dsa": ("glm_moe_dsa", {**_SPARSE, "indexer_types": ["full", "full", "full"]}),
    "glm_moe_dsa: shared selection": ("glm_moe_dsa", {**_SPARSE, "indexer_types": ["full", "shared", "full"]}),
}
