"""DeepSeek 3's mixtures in Llama's layout: GLM-4.5, dots.llm1, K-EXAONE and Solar Open; norms on Q and K.

The first layers may be dense. The router has scores of groups, a bias that corrects them, and a scale: all frozen.
"""

from typing import Any

from ..family import Experts, Family

MODEL_TYPES = ("glm4_moe", "dots1", "exaone_moe", "solar_open")


def declare(config: Any) -> Family:
    return Family(experts=Experts(top_k=config.num_experts_per_tok, shared="mlp.shared_experts"))
