"""Mistral: Llama's layout with a sliding attention window, which the attention call itself announces."""

from .base import Family

FAMILY = Family(model_types=("mistral",))
