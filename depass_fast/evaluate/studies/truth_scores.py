"""The scores of a misleading prompt's tokens: how much each speaks for the false answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...components.model import Tokens
from ...engine import DePass
from ...inputs.targets import Contrast
from ...options import RuleName
from ...trace.record import Trace
from ..methods.base import GRADIENT_INPUT, RANDOM, SHAPLEY, SOFTMAX
from ..methods.gradients import inputs_and_gradients
from ..probes import last_inputs
from .truth_questions import WRONG, Encoded

CLAIM, PROMPT = "information", "prompt"  # what is masked
ALONE = "softmax, claim alone"
OWN_STATE = "own hidden state"
SOFTMAX_OUTPUT, SHAPLEY_OUTPUT = "softmax, output", "shapley, output"
METHODS = (SOFTMAX, SHAPLEY, GRADIENT_INPUT, ALONE, OWN_STATE, SOFTMAX_OUTPUT, SHAPLEY_OUTPUT, RANDOM)
MEANINGS = {
    SOFTMAX: "tokens' shares in the classifier's logit at the prompt's last position",
    SHAPLEY: "the same under a linear rule",
    GRADIENT_INPUT: "gradient of that logit × input of layer 0",
    ALONE: "as published: the claim is a prompt of its own, read at every token by how false that one looks",
    OWN_STATE: "published baseline: the classifier's logit at the token itself",
    SOFTMAX_OUTPUT: "shares in the logit of the wrong answer less that of the right one",
    SHAPLEY_OUTPUT: "the same under a linear rule",
}
Scores: TypeAlias = dict[str, Tensor]


def scores_of(engine: DePass, one: Encoded, truth: Tensor, bias: float, layer: int, seed: int) -> Scores:
    """Return scores (N,) by method, in float32; the highest tokens speak the most for the false answer.

    ``truth`` (D,) and ``bias`` are a classifier's, of what enters ``layer``. Tokens outside the claim have NaN in
    :data:`ALONE`. All but :data:`OWN_STATE` and :data:`ALONE` are read at the last position.
    """
    ids = one.ids[WRONG]
    trace, n = engine.trace(ids), len(ids)
    truth = truth.to(ids.device)
    target = Contrast(one.wrong, one.right)
    found = {
        SOFTMAX: _shares(engine, trace, -truth, SOFTMAX, layer)[:n],
        SHAPLEY: _shares(engine, trace, -truth, SHAPLEY, layer)[:n],
        SOFTMAX_OUTPUT: _shares(engine, trace, target, SOFTMAX, None)[:n],
        SHAPLEY_OUTPUT: _shares(engine, trace, target, SHAPLEY, None)[:n],
        GRADIENT_INPUT: _gradient_times_input(engine, ids, -truth, layer),
        ALONE: _claim_alone(engine, one, truth, bias, layer),
        OWN_STATE: -(trace.resid(layer).float() @ truth),
        RANDOM: torch.rand(n, generator=torch.Generator().manual_seed(seed)),
    }
    return {method: found[method].detach().to("cpu", torch.float32) for method in METHODS}


def _shares(engine: DePass, trace: Trace, target: Any, rule: RuleName, end: int | None) -> Tensor:
    return engine.attribute(trace, Tokens(), target, end=end, allocation=rule).scores


def _gradient_times_input(engine: DePass, ids: Tensor, direction: Tensor, layer: int) -> Tensor:
    """Return gradient × input of every token (N,): of what enters a layer at the last position, in a direction (D,)."""

    def read() -> list[Tensor]:
        return [last_inputs(engine, ids[None], [layer])[0, 0].float() @ direction]

    (inputs,), ((gradient,),) = inputs_and_gradients([engine.adapter.block(0)], read)
    return (inputs * gradient).sum(-1)


def _claim_alone(engine: DePass, one: Encoded, truth: Tensor, bias: float, layer: int) -> Tensor:
    """Return the published scores (N,): the claim is a prompt of its own, behind the special tokens that lead.

    Token m's score is Σ_n ω_n ⟨truth, X[n, m]⟩ over the claim's positions n, with ω_n the classifier's probability that
    n's own hidden state is of a false statement, scaled to a sum of one.
    """
    ids = one.ids[WRONG].cpu()
    leading = int(one.special.long().cumprod(0).sum())
    trace = engine.trace(torch.cat([ids[:leading], ids[one.claim]]).to(truth.device))
    places = list(range(leading, leading + int(one.claim.sum())))
    results = engine.attribute(trace, Tokens(), truth, end=layer, position=places, allocation=SOFTMAX)
    shares = torch.stack([result.scores for result in results])[:, places].float()  # (claim, claim)
    false = torch.sigmoid(-(trace.resid(layer)[places].float() @ truth + bias)).to(shares)
    found = torch.full((len(ids),), torch.nan)
    found[one.claim] = -((false / false.sum()) @ shares).cpu()
    return found


def spans_of(one: Encoded) -> Mapping[str, Tensor]:
    """Return what may be masked, (N,) bool: the claim's tokens; and the prompt's, but for special ones and the last.

    The beginning of an answer stays, too.
    """
    whole = ~one.special
    whole[len(whole) - 1 - one.begun :] = False
    return {CLAIM: one.claim, PROMPT: whole}
