"""The frozen numbers of layers that mix positions by more than probabilities alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..adapters import Recurrence
from ..runtime.brief import brief_repr


@dataclass
class RecurrenceTrace:
    """The frozen numbers of a recurrence, beside its queries and keys (:class:`depass_fast.adapters.Recurrence`)."""

    decay: Tensor | None  # (T, H, 1) or (T, H, n) in float32 or wider; None: a softmax in the place of a recurrence
    write: Tensor | None = None  # (T, H)
    in_ratio: Tensor | None = None  # (T, H·d)
    skip: Tensor | None = None  # (H,)
    own: Tensor | None = None  # (T, H), where a head reads the state before its own position
    corrects: bool = False
    rates: Tensor | None = None  # (H, n) factors of the decay, as `skip` the same at every position
    relative: Tensor | None = None  # (T, H, r), and (r, distances): a softmax' logits have their product at q - k
    distances: Tensor | None = None

    __repr__ = brief_repr


@dataclass
class KeyedTrace:
    """The frozen numbers of keys that are values, beside the queries and keys of positions (DESIGN.md section 10).

    Pairs of neighbours among the last channels of a head are turned by ``cos`` and ``sin``. Every window of ``rate``
    positions is an entry, whose key stands at the window's last position and is turned as its first one is.
    """

    cos: Tensor  # (T, r / 2) for the last r channels
    sin: Tensor  # (T, r / 2)
    entries: Tensor | None = None  # (T, d) keys of entries, zero where no window ends
    sinks: Tensor | None = None  # (H,) logits of nothing, of the model and not of a position
    rate: int | None = None
    overlaps: bool = False  # the first half of an entry's channels comes from the window before

    __repr__ = brief_repr


def frozen(recurrence: Recurrence) -> RecurrenceTrace:
    """Return what a trace keeps of a recurrence beside its queries and keys."""
    names = ("decay", "write", "in_ratio", "skip", "own", "corrects", "rates", "relative", "distances")
    return RecurrenceTrace(**{name: getattr(recurrence, name) for name in names})
