"""Qwen2 (biases on Q, K and V) and Qwen3 (norms on Q and K, a head dimension of its own): Llama's layout.

The norms and biases of Q and K end in the frozen attention probabilities; only V's bias is ever propagated.
"""

from .base import Family

FAMILY = Family(model_types=("qwen2", "qwen3"))
