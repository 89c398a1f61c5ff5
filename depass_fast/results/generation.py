"""Generated text, and the tokens that every token of it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .attribution import Attribution
from .continuation import Continuation
from .files import register_format


@dataclass(eq=False, repr=False)
class Generation(Continuation[Attribution]):
    """A :class:`depass_fast.Continuation` that the model generated: the shares of all tokens before each new one.

    ``steps`` holds an :class:`Attribution` per generated token, ``input_ids`` and ``tokens`` all N tokens.
    """

    origin: ClassVar[str] = "generated"
    format: ClassVar[str] = "depass_fast.generation.v1"

    @property
    def scores(self) -> Tensor:
        """The shares of tokens in generated tokens: (T, N), without `bias`, zero where they do not come before."""
        return super().scores[:, : len(self.input_ids)]

    @property
    def log_prob_scores(self) -> Tensor:
        """The shares of tokens in the log-probabilities of generated tokens: (T, N), without `bias`."""
        return super().log_prob_scores[:, : len(self.input_ids)]


register_format(Generation.format, Generation.restore)
