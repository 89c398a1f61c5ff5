"""Why a head looked where it looked: the logits of one query, shared out over components."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..runtime.numbers import as_index
from ..runtime.terminal import encodable
from .attention_pages import ExplanationPage
from .attention_view import View, plain
from .drawn import DrawnExplanation
from .files import known_fields, read_result, register_format, write_result
from .parts import parts_of, plain_values
from .provenance import Provenance
from .ranking import leading
from .tables import data_frame, write_csv
from .verification import Verification

if TYPE_CHECKING:
    import pandas

FORMAT = "depass_fast.attention.v1"
TENSORS = ("scores", "probabilities", "query_side", "key_side", "query_mean", "key_mean", "entropy")
SIDES = ("both", "query", "key")
Which = Literal["both", "query", "key"]
Norms = Literal["react", "held"]


class Pair(NamedTuple):
    """A component of the query, one of the key, and their share of the logit."""

    query: str
    key: str
    score: float


@dataclass(eq=False)
class AttentionExplanation(DrawnExplanation, ExplanationPage):
    """The logits of the heads of one layer at one query, as sums over components (DESIGN.md section 9).

    Shapes are those of a call with one ``head``; with several, every tensor has them as its first axis (H, ...).

    ``scores`` (K,) are the logits of the ``keys``, final: scaled, capped, with what is added for a key's place.
    ``probabilities`` (K,) are what the softmax over all keys makes of them. ``query_side`` (K, M) are the shares of
    what the query's position holds, ``key_side`` (K, M) of what the key's holds: **each side sums to the logit**.
    ``query_mean`` and ``key_mean`` (M,) are the averages of the shares under P over all keys that the query sees, and
    ``entropy`` () is that of P, in nats. ``sink`` () is the probability of looking nowhere, None without a sink.

    ``labels`` (M,) are the components of the positions up to the query, then `rest`, `bias` (constants of queries and
    keys included) and `position` (ALiBi) where they exist. The components are at the input of ``layer``, where
    attention reads them; ``start`` is the layer where they started.

    ``asked`` says which keys were asked for: "all" that the query sees, "one", or "pair" (why the first and not the
    second).

    ``completeness_error`` is the largest of |Σ_m share - logit|, relative to Σ_m |share| and to the norm of the
    products that the logit sums up, over heads, keys and sides; and of ``layer_errors``, those of the states as in
    :class:`depass_fast.Attribution`.
    """

    scores: Tensor
    probabilities: Tensor
    query_side: Tensor
    key_side: Tensor
    query_mean: Tensor
    key_mean: Tensor
    entropy: Tensor
    labels: list[str]
    layer: int
    heads: list[int]
    query: int
    keys: list[int]
    completeness_error: float
    layer_errors: list[float]
    input_ids: list[int]
    tokens: list[str]
    components: str
    start: int
    allocation: str
    temperature: float
    backend: str
    device: str
    dtype: str
    state_dtype: str
    compute_dtype: str
    seconds: float
    one_head: bool = True
    asked: str = "all"
    sink: Tensor | None = None
    site: str | None = None
    exclude_special: list[int] | None = None
    verification: Verification | None = None
    warnings: list[str] | None = None
    provenance: Provenance | None = None
    unknown: dict[str, Any] = field(default_factory=dict, repr=False)
    _parts: Callable[[int, int], tuple[Tensor, Tensor, Tensor]] | None = field(default=None, repr=False)
    _looks: Callable[[str, bool], Tensor] | None = field(default=None, repr=False)
    _without: dict[tuple[str, bool], Tensor] = field(default_factory=dict, repr=False)

    # -- shares ---------------------------------------------------------------------------------------------------

    @property
    def shares(self) -> Tensor:
        """The shares of both sides, half of each: (K, M). They sum to the logit."""
        return (self.query_side + self.key_side) / 2

    @property
    def mean_shares(self) -> Tensor:
        """The averages of :attr:`shares` under P over all keys that are seen: (M,)."""
        return (self.query_mean + self.key_mean) / 2

    def log_probability(self, key: int, head: int | None = None) -> Tensor:
        """Return the shares (M,) of a key's log-probability against all keys: they sum to log P_k + the entropy of P.

        A share is that of the logit, less its average under P over all keys that are seen.
        """
        at = self._key(key)
        own, mean = self.shares, self.mean_shares
        if not self.one_head:
            number = self._head(head)
            return own[number, at] - mean[number]
        self._head(head)
        return own[at] - mean

    def difference(self, key: int | None = None, other: int | None = None, head: int | None = None) -> Tensor:
        """Return the shares (M,) of log(P_key / P_other): why here and not there. No softmax is in it.

        Without arguments the keys are the two that were asked for.

        Raises:
            ValueError: keys are left out, and there are not just two.
        """
        if key is None and other is None:
            if len(self.keys) != 2:
                raise ValueError(f"difference: give two keys; this explanation holds {len(self.keys)}.")
            key, other = self.keys
        if key is None or other is None:
            raise ValueError("difference: give both keys, or none for the two that were asked for.")
        shares = self._of_head(self.shares, head)
        return shares[self._key(key)] - shares[self._key(other)]

    def top(
        self,
        k: int = 10,
        key: int | None = None,
        side: Which = "both",
        head: int | None = None,
        by: str = "magnitude",
    ) -> list[tuple[str, float]]:
        """Return the ``k`` leading components of a key's logit as (label, share); default: the most probable key's.

        ``side`` is "query", "key" or "both" (half of each). ``by`` is "magnitude", "positive" or "negative".
        """
        if side not in SIDES:
            raise ValueError(f"side: {side!r} is not one of {', '.join(map(repr, SIDES))}.")
        shares = {"both": self.shares, "query": self.query_side, "key": self.key_side}[side]
        at = int(self._of_head(self.probabilities, head).argmax()) if key is None else self._key(key)
        return leading(self.labels, self._of_head(shares, head)[at], k, by)

    def pairs(self, key: int, k: int = 10, head: int | None = None) -> list[Pair]:
        """Return the ``k`` leading pairs of a component of the query and one of the key; all pairs sum to the logit.

        The M² pairs are made some at a time, and only the leading ones are kept.

        Raises:
            ValueError: the components of that key were not kept, as in a result that was read from a file, or where
                there were too many; ask for that key alone.
        """
        at, number = self.keys[self._key(key)], self.heads[self._head(head)]
        if as_index(k, "k") < 1:
            raise ValueError(f"k: {k} is out of range; it must be at least 1.")
        if self._parts is None:
            raise ValueError(
                "pairs: what the keys hold was not kept; ask explain_attention(..., key=...) for that key alone."
            )
        of_query, of_key, place = self._parts(number, at)
        scores, queries, keys = _leading_pairs(of_query, of_key, place, k)
        found = zip(queries, keys, scores, strict=True)
        return [Pair(self.labels[q], self.labels[m], score) for q, m, score in found]

    def without(self, side: Which = "both", norms: Norms = "react", head: int | None = None) -> Tensor:
        """Return where the head would look without each component: probabilities (M, N) of the positions 0 to query.

        The component is taken out of what the query reads, of what the keys read, or of both; its constants stay. This
        is the head itself, computed again: shares are parts of a sum, and say something else. With ``norms`` "held",
        norms in front of queries and keys, and clamps of these, are as they were.

        Raises:
            ValueError: ``side`` or ``norms`` is another word; the components of the keys were not kept, see
                :meth:`pairs`, or not all keys were asked for.
        """
        if side not in SIDES:
            raise ValueError(f"side: {side!r} is not one of {', '.join(map(repr, SIDES))}.")
        if norms not in ("react", "held"):
            raise ValueError(f"norms: {norms!r} is neither 'react' nor 'held'.")
        number = self._head(head)
        if self._looks is None:
            raise ValueError(
                "without: what the keys hold was not kept; ask explain_attention for all keys (key=None), of a shorter "
                "prompt or of fewer components."
            )
        asked = side, norms == "react"
        if asked not in self._without:  # all heads at once: their queries and keys are made together
            self._without[asked] = self._looks(*asked)
        return self._without[asked][number]

    def _head(self, head: int | None) -> int:
        """Return where a head is among those that were asked for."""
        if head is None:
            if len(self.heads) > 1:
                raise ValueError(f"head: this explanation holds {len(self.heads)} heads; choose one of {self.heads}.")
            return 0
        if as_index(head, "head") not in self.heads:
            raise ValueError(f"head: {head} was not asked for; this explanation holds {self.heads}.")
        return self.heads.index(head)

    def _of_head(self, x: Tensor, head: int | None) -> Tensor:
        number = self._head(head)
        return x if self.one_head else x[number]

    def _key(self, key: int) -> int:
        """Return where a key is among those that were asked for; negative ones count from the prompt's end."""
        given = as_index(key, "key")
        wanted = given + len(self.input_ids) if given < 0 else given
        if wanted not in self.keys:
            raise ValueError(f"key: {key} is not one of the keys of this explanation ({_range(self.keys)}).")
        return self.keys.index(wanted)

    # -- what it looks like, tables and files -----------------------------------------------------------------------

    def __str__(self) -> str:
        return plain(self)

    def __rich__(self) -> Any:
        return View(self)

    def __repr__(self) -> str:
        heads = f"heads {self.heads}" if len(self.heads) > 1 else f"head {self.heads[0]}"
        return encodable(
            f"AttentionExplanation(layer {self.layer}, {heads}, query {self.query} ({self.tokens[self.query]!r}), "
            f"{len(self.keys)} keys, {len(self.labels)} components, {self.components}; "
            f"completeness error {self.completeness_error:.1e})"
        )

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Return the names and the rows of a table: a row per head, key and component."""
        names = [
            "layer",
            "head",
            "query",
            "key",
            "key_token",
            "logit",
            "probability",
            "label",
            "query_side",
            "key_side",
        ]
        scores, p, q, k = (
            x[None] if self.one_head else x for x in (self.scores, self.probabilities, self.query_side, self.key_side)
        )
        rows = [
            [
                *(self.layer, head, self.query, key, self.tokens[key], float(scores[h, i]), float(p[h, i]), label),
                *(float(q[h, i, m]), float(k[h, i, m])),
            ]
            for h, head in enumerate(self.heads)
            for i, key in enumerate(self.keys)
            for m, label in enumerate(self.labels)
        ]
        return names, rows

    def to_dataframe(self) -> pandas.DataFrame:
        """Return a DataFrame with a row per head, key and component; ``attrs`` say how it was made. Needs pandas."""
        return data_frame(*self.table(), self._plain())

    def to_csv(self, path: str | Path) -> None:
        """Write a table with a row per head, key and component."""
        write_csv(path, *self.table())

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values."""
        return self._plain() | {name: value.tolist() for name, value in self._tensors().items()}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose header carries everything else as JSON. ``pairs`` cannot be asked of it."""
        write_result(path, FORMAT, self._tensors(), self._plain() | self.unknown)

    @classmethod
    def load(cls, path: str | Path) -> AttentionExplanation:
        """Read a file of :meth:`save`. Raises ValueError for any other file."""
        return read_result(path, FORMAT)

    @staticmethod
    def restore(tensors: dict[str, Tensor], content: dict[str, Any]) -> AttentionExplanation:
        """Return the result that a file holds."""
        known, unknown = known_fields(AttentionExplanation, content)
        parts = parts_of(known)
        return AttentionExplanation(**tensors, **known, **parts, unknown=unknown)

    def _tensors(self) -> dict[str, Tensor]:
        sink = {} if self.sink is None else {"sink": self.sink.contiguous()}
        return {name: getattr(self, name).contiguous() for name in TENSORS} | sink

    def _plain(self) -> dict[str, Any]:
        names = [one.name for one in fields(self)]
        left_out = {*TENSORS, "sink", "unknown", "_parts", "_looks", "_without"}
        return plain_values(self, [name for name in names if name not in left_out])

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_parts": None, "_looks": None}

    def __copy__(self) -> AttentionExplanation:
        """Return a copy, which answers `pairs` and `without`, too: only files and pickles hold no states."""
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionExplanation:
        """Return a deep copy; the states, which nobody changes, are shared."""
        made = self.__copy__()
        vars(made).update({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        made._parts, made._looks = self._parts, self._looks
        return made


_PAIRS = 1 << 22  # made at a time


def _leading_pairs(of_query: Tensor, of_key: Tensor, place: Tensor, k: int) -> tuple[list[float], list[int], list[int]]:
    """Return the ``k`` pairs of the largest |share|: their shares, and their components (queries', keys').

    ``of_query`` and ``of_key`` are (M, d), their product the share; ``place`` (M,) is added to a component with itself.
    """
    m = len(of_key)
    best, where = of_query.new_zeros(0), torch.zeros(0, dtype=torch.long, device=of_query.device)
    step = max(1, _PAIRS // m)
    for begin in range(0, len(of_query), step):
        made = of_query[begin : begin + step] @ of_key.T
        here = torch.arange(begin, begin + len(made), device=made.device)
        made[here - begin, here] += place[here]
        flat = made.flatten()
        few = flat.abs().topk(min(k, len(flat))).indices
        best, where = torch.cat([best, flat[few]]), torch.cat([where, few + begin * m])
        kept = best.abs().topk(min(k, len(best))).indices
        best, where = best[kept], where[kept]
    return best.tolist(), (where // m).tolist(), (where % m).tolist()


def _range(keys: Sequence[int]) -> str:
    if len(keys) > 2 and keys[-1] - keys[0] == len(keys) - 1:
        return f"{keys[0]} to {keys[-1]}"
    return ", ".join(map(str, keys))


register_format(FORMAT, AttentionExplanation.restore)
