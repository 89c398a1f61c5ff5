"""NanoChat: norms without weights, an ungated MLP with squared ReLU, a cap on the logits.

The last norm is the first, too: the embedding goes through it. Norms on Q and K end in the attention probabilities.
"""

from typing import Any

from ..family import Family

MODEL_TYPES = ("nanochat",)


def declare(config: Any) -> Family:
    return Family(
        logit_cap=config.final_logit_softcapping,
        qk_norm_last=True,
        gate_proj="mlp.fc1",
        up_proj=None,
        down_proj="mlp.fc2",
    )
