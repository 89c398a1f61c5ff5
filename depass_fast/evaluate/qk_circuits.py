"""Models built by hand whose heads look where they look for a known reason, and what attention's book says of them.

A token of theirs says what and where it is: its embedding is a sum of three parts, a constant, its name and its
position. Norms change nothing (:mod:`depass_fast.evaluate.blank`), and MLPs write nothing. In layer 0 one head
looks at the token before, by the positions, and copies its name to another place; one looks at all tokens of the same
name. In layer 1 one head looks at the tokens behind those of its own name: an induction head, whose key is what the
first head has copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..components.base import ComponentKind
from ..components.custom import Custom
from ..components.model import Heads
from ..engine import DePass
from .blank import SIZE, blank_model

NAMES, LENGTH = 4, 9
SEQUENCE = (1, 0, 2, 3, 1, 0, 2, 3, 0)  # names; the last one was seen at 1 and 5, and followed by 2 at 2 and 6
CONSTANT, SHARP = 0, 12.0  # SHARP: a logit of the key that is meant
NAME, PLACE = 1, 1 + NAMES
BEFORE = PLACE + LENGTH
ANSWER = BEFORE + NAMES
WIDTH, HEAD = 24, 32
PARTS = ("name", "position", "constant")


@dataclass(frozen=True)
class Circuit:
    """A head with a known reason: which key it looks at, and the components that make it do so, on either side."""

    layer: int
    head: int
    key: int
    components: str  # "parts" of the embedding, or "heads" of layer 0
    query_side: str
    key_side: str


CIRCUITS = {
    "previous token": Circuit(0, 0, LENGTH - 2, "parts", "position", "position"),
    "duplicate token": Circuit(0, 1, 5, "parts", "name", "name"),
    "induction": Circuit(1, 0, 6, "heads", "rest", "L0H0"),
}


def build() -> tuple[DePass, Tensor]:
    """Return the model and its prompt: ids (N,)."""
    model = blank_model(WIDTH, HEAD, NAMES * LENGTH)
    with torch.no_grad():
        for name in range(NAMES):
            for place in range(LENGTH):
                row = model.model.embed_tokens.weight[name * LENGTH + place]
                row[CONSTANT], row[NAME + name], row[PLACE + place] = SIZE, 1.0, 1.0
        first, second = (model.get_submodule(f"model.layers.{index}.self_attn") for index in range(2))
        _look(first, 0, [(PLACE + place, PLACE + place - 1) for place in range(1, LENGTH)])
        _copy(first, 0, BEFORE)
        same = [(NAME + name, NAME + name) for name in range(NAMES)]
        _look(first, 1, same)
        _look(second, 0, [(NAME + name, BEFORE + name) for name in range(NAMES)])
        _copy(second, 0, ANSWER)
        for name in range(NAMES):
            model.lm_head.weight[name, ANSWER + name] = 1.0
    return DePass(model, progress=False), torch.tensor([name * LENGTH + at for at, name in enumerate(SEQUENCE)])


def shares(dp: DePass, ids: Tensor) -> dict[str, dict[str, float]]:
    """Return, for every circuit, the part of the credit for its key that its own components get, on either side.

    The credit is that of the key's log-probability; the part is |share| of the component that is meant over the sum of
    all. ``probability`` is that of the key.
    """
    found = {}
    for name, circuit in CIRCUITS.items():
        why = dp.explain_attention(ids, _components(dp, ids, circuit), circuit.layer, circuit.head, key=circuit.key)
        row = {"probability": float(why.probabilities[0])}
        for side in ("query_side", "key_side"):
            mean = why.query_mean if side == "query_side" else why.key_mean
            credit = getattr(why, side)[0] - mean
            row[side] = float(credit[why.labels.index(getattr(circuit, side))].abs() / credit.abs().sum())
        found[name] = row
    return found


def _components(dp: DePass, ids: Tensor, circuit: Circuit) -> ComponentKind:
    if circuit.components == "heads":
        return Heads(0)
    embedded = dp.adapter.embedding.weight[ids].detach()  # (N, D)
    each = []
    for part in ((NAME, PLACE), (PLACE, BEFORE), (CONSTANT, NAME)):
        kept = torch.zeros_like(embedded)
        kept[:, slice(*part)] = embedded[:, slice(*part)]
        each.append(kept)
    return Custom(0, torch.stack(each, 1), labels=list(PARTS))


def _look(attention: torch.nn.Module, number: int, pairs: list[tuple[int, int]]) -> None:
    """Have a head look from one coordinate of the query's state to another one of the key's; pairs of these."""
    q, k = (attention.get_parameter(f"{name}_proj.weight") for name in "qk")
    unturned = [i for i in range(HEAD) if i % (HEAD // 2)]  # coordinates that the rotary embedding leaves as they are
    for (of_query, of_key), place in zip(pairs, unturned, strict=False):
        q[number * HEAD + place, of_query] += SHARP * math.sqrt(HEAD)  # the scale is taken back
        k[number * HEAD + place, of_key] += 1.0


def _copy(attention: torch.nn.Module, number: int, to: int) -> None:
    """Have a head copy the names that it looks at."""
    v, o = (attention.get_parameter(f"{name}_proj.weight") for name in "vo")
    for name in range(NAMES):
        v[number * HEAD + name, NAME + name] = 1.0
        o[to + name, number * HEAD + name] = 1.0
