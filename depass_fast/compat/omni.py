"""The name of a class for Qwen2.5-Omni that a fork of the published code has."""

from __future__ import annotations

from typing import Any


class qwenOmnimanager:
    """Qwen2.5-Omni's manager of a fork, which is not supported: it can be imported, and not made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "qwenOmnimanager: Qwen2.5-Omni, with its images, sound and video, is not supported; no call of this "
            "class works. Take decomposed_state_manager for a text model (docs/families.md lists them)."
        )
