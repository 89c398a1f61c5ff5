"""Stands for the published module of this name."""

from depass_fast.compat import decomposed_state_manager

__all__ = ["decomposed_state_manager"]
