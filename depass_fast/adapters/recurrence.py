"""A recurrence in the place of a softmax: the frozen numbers of it, whatever the family calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """Probabilities of queries and keys in the place of a recurrence, for values that are shaped like a recurrence's.

    ``scale`` and ``window`` are those of attention. With ``minus``, differential attention: of 2H heads of
    probabilities, the second half is subtracted from the first, times this.
    """

    scale: float
    window: int | None = None
    minus: float | None = None


@dataclass(frozen=True)
class Recurrence:
    """For every head, ``S[t] = e^decay[t] S[t-1] + k[t] u[t]ᵀ`` and ``o[t] = S[t]ᵀ q[t] + skip · x[t]``.

    ``u[t] = write[t] · x[t]`` for values x. With ``corrects``, the delta rule: ``u[t] = write[t] · (x[t] - (e^decay[t]
    S[t-1])ᵀ k[t])``. H heads may share queries and keys in groups (DESIGN.md section 10). With ``softmax`` there is
    none of this, and the decay is None: ``o = P x``. Its logits may have a bias by the distance of query and key:
    ``relative`` · ``distances``[:, q - k], and none from some distance on.

    With ``log_write`` in the place of ``write``, writes are its exponential and what heads give is divided by
    ``divisor(n, m)`` (T, H): e^m n is what they give where all values are one, and m is so large that n is not. Both
    are (T, H), and m is that of mLSTM's stabiliser, which begins at zero.

    With ``own`` a head reads the state as it was before its own position: ``o[t] = S[t-1]ᵀ q[t] + own[t] · x[t]``. With
    its logarithm ``log_own``, beside ``log_write``, what heads give is divided by what they give for ones.
    """

    q: Tensor  # (T, Hq, n)
    k: Tensor  # (T, Hk, n)
    decay: Tensor | None  # (T, H, 1) or (T, H, n): the logarithm of what is left of the state, at most zero
    write: Tensor | None = None  # (T, H); None: one
    corrects: bool = False
    skip: Tensor | None = None  # (H,)
    rates: Tensor | None = None  # (H, n) factors of the decay by channel of the state; None: one
    in_ratio: Tensor | None = None  # (T, H·d) a gate of the values in front of their convolution
    softmax: Softmax | None = None
    relative: Tensor | None = None  # (T, H, r)
    distances: Tensor | None = None  # (r, distances)
    own: Tensor | None = None  # (T, H)
    log_write: Tensor | None = None  # (T, H)
    log_own: Tensor | None = None  # (T, H)
    divisor: Callable[[Tensor, Tensor], Tensor] | None = None
