"""A model of two layers, built by hand, whose effects of leaving a component out are known, with their two parts.

It has attention alone: its MLPs write nothing, and its norms change nothing, as a constant that nobody reads makes up
nearly all of every state. A token has up to three numbers: a steer, a key and a payload. The heads of layer 0 attend to
all tokens alike. One of them adds up steers; the other adds up steers, and copies payloads to the answer. In layer 1
one head fetches payloads: a token's weight grows with its key times the steer. The other attends to all tokens alike
and copies payloads, too. The answer is the difference of two logits.

So what is left out of the steer changes attention alone, a payload without a key changes no attention, and the others
have both parts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from ..engine import DePass
from .blank import SIZE, blank_model
from .questions import Question

CONSTANT, STEER, STEERED, KEY, PAYLOAD, ANSWER = range(6)  # coordinates of the residual stream
WIDTH = 8  # of the residual stream
UNTURNED = 3  # a coordinate of a head that the rotary embedding leaves as it is
TARGET, FOIL = 5, 6  # tokens whose logits are plus and minus half the answer


class Token(NamedTuple):
    """The three numbers of a token."""

    steer: float = 0.0
    key: float = 0.0
    payload: float = 0.0


class Head(NamedTuple):
    """The weights of a head: of the steers that it adds up, of the payloads that it copies; and whether it fetches."""

    steers: float = 0.0
    copies: float = 0.0
    fetches: bool = False


TOKENS = {
    "a steer": Token(steer=4.0),
    "a payload": Token(payload=0.5),
    "a key and a payload": Token(key=1.0, payload=1.0),
    "a steer and a payload": Token(steer=2.0, payload=0.5),
    "the place of the answer": Token(),
}
HEADS = {
    "L0H0, steers": (0, Head(steers=1.5)),
    "L0H1, steers and copies": (0, Head(steers=0.5, copies=0.5)),
    "L1H0, fetches": (1, Head(copies=3.0, fetches=True)),
    "L1H1, copies": (1, Head(copies=1.0)),
}


def build() -> tuple[DePass, Question]:
    """Return the model and its question: the tokens of :data:`TOKENS` in their order."""
    model = blank_model(WIDTH, WIDTH, len(TOKENS) + 2)
    with torch.no_grad():
        for number, token in enumerate(TOKENS.values()):
            row = model.model.embed_tokens.weight[number]
            row[[CONSTANT, STEER, KEY, PAYLOAD]] = torch.tensor([SIZE, *token])
        for number, (layer, head) in enumerate(HEADS.values()):
            _set_head(model.get_submodule(f"model.layers.{layer}.self_attn"), number % 2, head)
        model.lm_head.weight[[TARGET, FOIL], ANSWER] = torch.tensor([0.5, -0.5])
    ids = torch.arange(len(TOKENS))
    question = Question(0, "", "", ids, TARGET, FOIL, torch.zeros(len(ids), dtype=torch.bool))
    return DePass(model, progress=False), question


def _set_head(attention: torch.nn.Module, number: int, head: Head) -> None:
    """Write the weights of one head; its values are a token's steer and payload."""
    q, k, v, o = (attention.get_parameter(f"{name}_proj.weight") for name in "qkvo")
    first = number * WIDTH
    v[first, STEER] = v[first + 1, PAYLOAD] = 1.0
    o[STEERED, first], o[ANSWER, first + 1] = head.steers, head.copies
    if head.fetches:
        q[first + UNTURNED, STEERED], k[first + UNTURNED, KEY] = math.sqrt(WIDTH), 1.0  # the scale is taken back


def expected() -> dict[str, tuple[float, float]]:
    """Return the parts of every component's effect, by its name: with attention held, and by its change.

    The last token is left out: it is where the answer is read, and has no numbers.
    """
    tokens = list(TOKENS.values())
    whole, held = _answer(tokens)
    found = {}
    for number, name in enumerate(list(TOKENS)[:-1]):
        left = [Token() if i == number else token for i, token in enumerate(tokens)]
        found[name] = _parts(whole, _answer(left, held=held)[0], _answer(left)[0])
    for name in HEADS:
        found[name] = _parts(whole, _answer(tokens, {name}, held)[0], _answer(tokens, {name})[0])
    return found


def _parts(whole: float, frozen: float, free: float) -> tuple[float, float]:
    return whole - frozen, frozen - free


def _answer(
    tokens: Sequence[Token], off: Collection[str] = (), held: Sequence[float] | None = None
) -> tuple[float, list[float]]:
    """Return the answer without the heads ``off``, and how the last token attends to all where payloads are fetched.

    ``held``: attention as it is to be.
    """
    n, heads = len(tokens), [head for name, (_, head) in HEADS.items() if name not in off]
    steer = sum(head.steers for head in heads) * sum(token.steer for token in tokens) / n
    weights = [math.exp(steer * token.key) for token in tokens]
    attention = [weight / sum(weights) for weight in weights] if held is None else list(held)
    fetched = sum(p * token.payload for p, token in zip(attention, tokens, strict=True))
    copied = sum(token.payload for token in tokens) / n
    return sum(head.copies * (fetched if head.fetches else copied) for head in heads), attention
