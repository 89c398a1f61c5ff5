"""DeepSeek 3.2 and GLM-5: DeepSeek's latent attention, where an indexer selects the keys of every query.

In GLM-5 some layers take the selection of the layer before.
"""

from dataclasses import replace
from typing import Any

from ..family import Family
from . import deepseek

MODEL_TYPES = ("deepseek_v32", "glm_moe_dsa")


def declare(config: Any) -> Family:
    return replace(deepseek.declare(config), selects=config.index_topk)
