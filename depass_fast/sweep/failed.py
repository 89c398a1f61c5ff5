"""A prompt of a sweep that could not be attributed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# what a prompt may be at fault for; anything else is an error of the library or of the machine, and stops a sweep
OF_A_PROMPT = (ValueError, TypeError, FloatingPointError, MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class FailedPrompt:
    """The place of a result that there is none of, and why. It counts as false: ``if result: ...``.

    id: that of the prompt. reason: the message of the error. error: the name of its class.
    """

    id: str
    reason: str
    error: str

    @classmethod
    def of(cls, id: str, error: Exception, advice: str = "") -> FailedPrompt:
        """Return the failure that an error is, with ``advice`` behind its message."""
        return cls(id, (" ".join(str(error).split()) or type(error).__name__) + advice, type(error).__name__)

    def __bool__(self) -> bool:
        return False
