"""Stands for the module of this name in a fork of the published package."""

from depass_fast.compat.omni import qwenOmnimanager

__all__ = ["qwenOmnimanager"]
