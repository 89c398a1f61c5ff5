"""The library's logger, and messages that appear once per process."""

from __future__ import annotations

import logging

_log = logging.getLogger("depass_fast")
_said: set[str] = set()


def say_once(text: str) -> None:
    """Log ``text`` at level INFO, once per process."""
    if text not in _said:
        _said.add(text)
        _log.info(text)
