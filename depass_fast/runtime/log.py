"""The library's logger, messages that appear once per process, and warnings that name the user's own line."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import warnings
from pathlib import Path

import torch

_log = logging.getLogger("depass_fast")
_said: set[str] = set()
# the last calls what a context manager decorates
_INSIDE = (f"{Path(__file__).parents[1]}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}", contextlib.__file__)


def say_once(text: str, level: int = logging.INFO) -> None:
    """Log ``text`` once per process, by default at level INFO."""
    if text not in _said:
        _said.add(text)
        _log.log(level, text)


def warn_user(text: str, category: type[Warning]) -> None:
    """Warn at the line outside of the library and of PyTorch that led here, however many calls are in between."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
