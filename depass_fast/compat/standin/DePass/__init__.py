"""Stands for the published package, see :mod:`depass_fast.compat`."""

from .manager import decomposed_state_manager

__all__ = ["decomposed_state_manager"]
