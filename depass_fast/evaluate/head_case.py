"""One head of one prompt: what methods say of the tokens that make it look where it looks, and what they really do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..engine import DePass
from ..looking.logits import Logits, logits_of
from ..looking.path import path_average
from ..looking.steer import Outlook
from ..looking.without import BOTH, KEY, QUERY, TAKEN_OUT, whole
from ..trace.record import Trace
from .interventions import logits_after
from .questions import CONTRAST, READS, Question
from .relooked import looking, probabilities_of, sides_without

KEY_LOG_P, LOGIT = "log P of the leading key", "logit difference"
REACT, HELD = "norms react", "norms held"
NORMS = (REACT, HELD)
BOOK, FIRST, GRADIENT, CARRIED, NORM = "this book", "AttnLRP's split", "gradient × input", "carried share", "norm"


class HeadCase:
    """A head whose layer reads ``x`` (N, D), a sum of M tokens' ``parts`` (M, N, D), and what it is worth.

    ``outlook`` is of the whole layer; its first row of gradients counts.
    """

    def __init__(self, x: Tensor, parts: Tensor, outlook: Outlook, head: int) -> None:
        self.x, self.parts, self.outlook, self.head = x, parts, outlook, head
        self.sides, self.record = outlook.sides, outlook.trace
        self.kv = head // self.sides.groups
        self.p = probabilities_of(self.sides, self.record, head)
        self.key = int(self.p[-1].argmax())

    def actual(
        self, engine: DePass, question: Question, trace: Trace, layer: int
    ) -> dict[tuple[str, str, str], Tensor]:
        """Return how the measures fall (M,) when each token is taken out of a side or both, and norms react or not."""
        found: dict[tuple[str, str, str], Tensor] = {}
        for side, norms in itertools.product(TAKEN_OUT, NORMS):
            left = [sides_without(self.sides, self.x, part, side, norms == REACT) for part in self.parts]
            p = torch.stack([self.p, *(probabilities_of(one, self.record, self.head) for one in left)])
            log_p = p[:, -1, self.key].log()
            with looking(engine, trace, layer, self.head, p):
                values = question.values(logits_after(engine, question.ids.expand(len(p), -1)))
            values = values[:, READS.index(CONTRAST)]
            for measure, one in ((KEY_LOG_P, log_p), (LOGIT, values)):
                found[measure, norms, side] = (one[0] - one[1:]).cpu()
        return found

    def predictions(self, half: Outlook, gradient: Tensor, carried: Tensor) -> dict[tuple[str, str, str], Tensor]:
        """Return what every method says of each token (M,), by measure, side and method.

        ``half`` is the outlook under the half rule, ``gradient`` (N, d) the model's own at the head's output,
        ``carried`` (M,) the scores of tokens.
        """
        worth = gradient.to(self.p) @ self.outlook.values[:, self.kv].T  # (N, N)
        of_log_p = torch.zeros_like(self.p)
        of_log_p[-1] = -self.p[-1]
        of_log_p[-1, self.key] += 1.0  # the derivative of log P by the logits
        by_method = {
            (KEY_LOG_P, BOOK): self._split(of_log_p),
            (LOGIT, BOOK): self._split(self._average(self.outlook)),
            (LOGIT, FIRST): self._split(self._slope(half)),
            (KEY_LOG_P, GRADIENT): self._graded(lambda p: p[-1, self.key].log()),
            (LOGIT, GRADIENT): self._graded(lambda p: (p * worth).sum()),
        }
        found: dict[tuple[str, str, str], Tensor] = {}
        for (measure, method), (query, key) in by_method.items():
            for side, scores in ((QUERY, query), (KEY, key), (BOTH, query + key)):
                found[measure, side, method] = scores.cpu()
        norm = self.parts.norm(dim=-1).sum(1).cpu()
        for side in TAKEN_OUT:
            found |= {(LOGIT, side, CARRIED): carried.cpu(), (KEY_LOG_P, side, NORM): norm, (LOGIT, side, NORM): norm}
        return found

    def _logits(self) -> Logits:
        at, head = torch.arange(len(self.p), device=self.x.device), slice(self.head, self.head + 1)
        return logits_of(self.sides, self.record, self.outlook.span, head, at)

    def _split(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ_qk w[q, k] S_m[q, k] of every token (M,), S_m being its share on the query's, or the key's side."""
        sides, w = self.sides, weights * self._logits().ratio[0]
        of_q, of_k = torch.zeros_like(sides.q), torch.zeros_like(sides.k)
        of_q[:, self.head], of_k[:, self.kv] = w @ sides.k[:, self.kv], w.T @ sides.q[:, self.head]
        return self._times_parts(sides.of_q.back(of_q)), self._times_parts(sides.of_k.back(of_k))

    def _worth(self, outlook: Outlook) -> Tensor:
        """Return what it is worth at every query to look at a key, (N, N)."""
        worth = torch.zeros_like(self.p)
        worth[outlook.queries] = outlook.of_heads[0, :, self.head] @ outlook.values[:, self.kv].T
        return worth

    def _average(self, outlook: Outlook) -> Tensor:
        """Return the derivative of the read by every logit, averaged over the path from even attention: (N, N)."""
        found, worth = self._logits(), self._worth(outlook)[None, None]
        worth = nn.functional.pad(worth, (0, 1)) if found.has_sink else worth
        return path_average(found.values, worth)[0][0, 0, :, : len(self.p)]

    def _slope(self, outlook: Outlook) -> Tensor:
        """Return the same derivative at the model's own attention."""
        worth = self._worth(outlook)
        return self.p * (worth - (self.p * worth).sum(-1, keepdim=True))

    def _graded(self, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return gradient × input of every token's part on the query's and the key's side, through the norms: (M,)."""
        with torch.enable_grad():
            of_q, of_k = (self.x.detach().clone().requires_grad_() for _ in range(2))
            sides = replace(self.sides, q=whole(self.sides.of_q, of_q), k=whole(self.sides.of_k, of_k))
            read = value(probabilities_of(sides, self.record, self.head))
            query, key = torch.autograd.grad(read, [of_q, of_k])
        return self._times_parts(query), self._times_parts(key)

    def _times_parts(self, gradients: Tensor) -> Tensor:
        return torch.einsum("mnd,nd->m", self.parts, gradients)
