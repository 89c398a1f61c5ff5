"""Models that nobody would train: weights far too large, gates or activations of zero."""

import torch

from depass_fast import DePass

from .family_models import build_model

# Changes of a model: the weights (by a part of their names), which of their rows, and the factor of these.
CHANGES = {
    "weights": ("proj", slice(None), 30.0),
    "no activations": ("up_proj", slice(None), 0.0),
    "half the activations": ("up_proj", slice(None, None, 2), 0.0),
    "half the gates": ("gate_proj", slice(None, None, 2), 0.0),
    "no gates": ("gate_proj", slice(None), 0.0),
}


def extreme(change: str) -> tuple[DePass, dict]:
    model = build_model("llama", num_key_value_heads=2)
    if change == "temperature":
        return DePass(model), {"temperature": 1e-3}
    part, rows, factor = CHANGES[change]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter[rows] *= factor
    return DePass(model), {}
