"""The model's own logits at the places of a readout: its next tokens, and the check that targets are read as it does.

What lies behind the final norm is the one step that no trace records. So the model itself takes it, and every target's
logit is compared with the product that is shared out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters import Adapter
from ..adapters.stored import kind_of
from ..runtime.transfer import all_to_device, to_device
from ..trace.unembedding import is_plain, modules_behind, own_logits

_LOGITS = 1 << 26  # logits held at once
_QUANTISED = 0.05  # relative rounding of a head with 8-bit activations
_FLOAT32 = 1e-6  # models take scales and caps in float32, whatever their dtype


@dataclass(frozen=True)
class Places:
    """The places of a readout, each a prompt and a position of it, prompt by prompt, with what the model needs there.

    ``prompts`` are the ids (N,) of all tokens of every prompt, ``finals`` (T, D) their normed final hidden states, one
    prompt after the other. ``alone`` says that the model reads every place by itself, as it does where it generates.
    """

    pairs: Sequence[tuple[int, int]]
    prompts: Sequence[Tensor]
    finals: Tensor
    alone: bool = False

    def ids(self, device: torch.device) -> Tensor:
        """Return the tokens (P,) at all places."""
        ids = [self.prompts[prompt].numpy()[position] for prompt, position in self.pairs]
        return to_device(np.array(ids), device)

    def ways(self, adapter: Adapter, generated: bool) -> list[Places]:
        """Return these places, and where it matters in front of ``generated`` tokens, the same as they were read then.

        A model that generates is given the prompt, and then token by token.
        """
        both = generated and not is_plain(adapter)
        return [self, replace(self, alone=True)] if both else [self]


@dataclass(frozen=True)
class OwnLogits:
    """The model's logits of some tokens: ``slots`` maps a place and a token to one of ``logits`` (G,).

    ``next_tokens`` maps a place to the model's next token, where that was asked for. ``log_z`` (S, 2) are the logsumexp
    and the largest of all logits at the places ``summed``, each once and in order; ``top`` (S,) have the largest.
    """

    logits: Tensor
    slots: dict[tuple[int, int], int]
    next_tokens: dict[int, int]
    summed: list[int]
    log_z: Tensor
    top: Tensor

    @staticmethod
    def at(
        adapter: Adapter,
        places: Places,
        hidden: Tensor,
        tokens: Sequence[tuple[int, int]],
        asked: Sequence[int],
        summed: list[int],
        dtype: torch.dtype,
    ) -> OwnLogits:
        """Ask the model for ``tokens``, pairs of a place and a token in order of places, and for its own if ``asked``.

        ``hidden`` (P, D) are the normed final hidden states of all ``places``. Logits are ``summed`` up in ``dtype``.
        """
        device, wanted = adapter.unembedding_device, np.array(tokens, np.int64).reshape(-1, 2)
        chosen, all_of = np.array(asked, np.int64), np.array(summed, np.int64)
        given: list[Tensor] = []
        highest: list[Tensor] = []
        best: list[Tensor] = []
        log_z: list[Tensor] = []
        top: list[Tensor] = []
        for part, logits in _in_parts(adapter, places, hidden) if len(wanted) or len(chosen) else ():
            here = wanted[_inside(wanted[:, 0], part)]
            if len(here):
                at, of = all_to_device([here[:, 0] - part.start, here[:, 1]], logits.device)
                given.append(logits[at, of].to(device))
            for few in _rows_at(logits, part, chosen):
                values, tokens_there = few.max(-1)
                highest.append(values.to(device))
                best.append(tokens_there)
            for few in _rows_at(logits, part, all_of):
                wide = few.to(dtype)
                values, tokens_there = wide.max(-1)
                log_z.append(torch.stack([wide.logsumexp(-1), values], 1).to(device))
                top.append(tokens_there.to(device))
        next_tokens = dict(zip(asked, torch.cat(best).tolist() if best else [], strict=True))
        pairs = [*tokens, *next_tokens.items()]
        found = torch.cat(given + highest) if pairs else hidden.new_zeros(0)
        slots = {pair: slot for slot, pair in enumerate(pairs)}
        if not summed:
            return OwnLogits(found, slots, next_tokens, [], hidden.new_zeros(0, 2), hidden.new_zeros(0))
        return OwnLogits(found, slots, next_tokens, summed, torch.cat(log_z), torch.cat(top))

    def of(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Return the logits (K,) of pairs of a place and a token."""
        slots = [self.slots[pair] for pair in pairs]
        in_order = slots == list(range(len(self.logits)))
        return self.logits if in_order else self.logits[to_device(np.array(slots), self.logits.device)]


def _inside(places: np.ndarray, part: slice) -> np.ndarray:
    return (part.start <= places) & (places < part.stop)


def _rows_at(logits: Tensor, part: slice, places: np.ndarray) -> Iterator[Tensor]:
    """Yield the rows of ``logits`` (P', vocabulary) at those of ``places``, in order, that lie in ``part``, if any."""
    rows = places[_inside(places, part)] - part.start
    if len(rows):
        yield logits if len(rows) == len(logits) else logits[to_device(rows, logits.device)]


def _in_parts(adapter: Adapter, places: Places, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits (P', vocabulary) of some places after the other.

    Code of a user's is shown one whole prompt at a time. All its logits are then held, as in the model's own pass.
    """
    if not (places.alone or is_plain(adapter)):
        yield from _by_prompt(adapter, places)
        return
    size, ids = max(1, _LOGITS // adapter.vocabulary_size), places.ids(adapter.device)
    for first in range(0, len(hidden), size):
        part = slice(first, min(first + size, len(hidden)))
        yield part, own_logits(adapter, ids[part, None], hidden[part, None])[:, -1]


def _by_prompt(adapter: Adapter, places: Places) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits (P', vocabulary) of one prompt's places after the other's, from a pass over all its tokens."""
    finals, first = places.finals.split([len(ids) for ids in places.prompts]), 0
    for prompt, group in groupby(places.pairs, key=lambda pair: pair[0]):
        positions = np.array([position for _, position in group])
        hidden = finals[prompt].to(adapter.unembedding_device)
        (logits,) = own_logits(adapter, places.prompts[prompt][None], hidden[None])
        yield slice(first, first + len(positions)), logits[to_device(positions, logits.device)]
        first += len(positions)


def sums_of_products(vectors: Tensor, hidden: Tensor) -> Tensor:
    """Return the sums, the norms and the sums of sizes of the products of vectors (K, D) with states (K, D): (K, 3)."""
    products = vectors * hidden.to(vectors)
    return torch.stack([products.sum(1), products.norm(dim=1), products.norm(1, dim=1)], 1)


def rounding(adapter: Adapter, hidden: torch.dtype, own: torch.dtype, sums: Sequence[float], logit: float) -> float:
    """Return how far the model's ``logit`` may be from a sum of products for the sake of rounding.

    Its products are rounded once at the end, and on the way as far as its dtype lets them be. ``hidden`` and ``own``
    are the dtypes of hidden states and logits, ``sums`` are a row of :func:`sums_of_products`.
    """
    eps = max(*(torch.finfo(dtype).eps for dtype in (own, hidden, adapter.dtype)), _FLOAT32)  # Mamba widens the former
    if kind_of(adapter.unembedding) is not None:
        eps = max(eps, _QUANTISED)
    total, norm, size = sums
    return eps * (2 * max(abs(total), abs(logit)) + 4 * norm) + _FLOAT32 * size


def check_log_z(
    adapter: Adapter, own: OwnLogits, log_z: Tensor, finite: Tensor, sums: Tensor, hidden: torch.dtype
) -> None:
    """Compare log partition functions (S,) with those of the model's ``own`` logits, at the places that it ``summed``.

    ``finite`` (S,) says that the unembedding is, ``sums`` (S, 3) are rows of :func:`sums_of_products` of some tokens
    there, whose rounding all have about. ``hidden`` is the dtype of the hidden states.

    Raises:
        ValueError: a row of the unembedding holds NaN or inf, or the model's are other ones.
    """
    columns = torch.stack([log_z, finite.to(log_z)], 1), own.log_z, sums.to(log_z)
    for ours, is_finite, theirs, highest, *sizes in torch.cat(columns, 1).tolist():
        if not (is_finite and math.isfinite(ours)):
            raise ValueError("target: a row of the unembedding holds NaN or inf, so that no log-probability exists.")
        if not abs(ours - theirs) <= 4 * rounding(adapter, hidden, own.logits.dtype, sizes, highest):
            raise ValueError(
                f"target: the logsumexp of the model's logits is {theirs:.6g}, that of its unembedding {ours:.6g}: "
                f"{_changed_by(adapter)} changes what follows the final norm. Remove it."
            )


def refusal(adapter: Adapter, name: str, own: float, ours: float) -> str:
    """Return the message for a target whose logit in the model is another than the one that would be shared out."""
    return (
        f"target: the model gives {name} the logit {own:.6g}, its unembedding {ours:.6g}: {_changed_by(adapter)} "
        "changes what follows the final norm, and the shares would not be those of the model's logit. Remove it, or "
        f"give the direction itself as the target, a vector of shape ({adapter.hidden_size},)."
    )


def _changed_by(adapter: Adapter) -> str:
    """Name the hooks behind the final norm; where there are none, the code that may be different."""
    model, head = adapter.model, adapter.unembedding
    places: dict[str, nn.Module] = {
        adapter.name_of(module) if module is head else type(module).__name__: module
        for module in modules_behind(adapter)
    }
    hooks = [f"a forward pre-hook on {name}" for name, module in places.items() if module._forward_pre_hooks]
    hooks += [f"a forward hook on {name}" for name, module in places.items() if module._forward_hooks]
    return " or ".join(hooks) or f"{type(model).__name__} (or {type(head).__name__}) has code of its own that"
