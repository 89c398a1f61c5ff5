"""A prompt and what follows it, given or generated: decomposed once, read in front of every token that follows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..adapters import Adapter
from ..agreement import agreed
from ..chosen_method import with_method
from ..components.base import ComponentKind
from ..components.model import Tokens
from ..inputs.continuation import encode_continued
from ..inputs.generation import generate
from ..inputs.loading import check_ready
from ..inputs.prompts import POSITIONS, Prompt, encode, is_batch, is_list_of_positions
from ..inputs.targets import LogProb, parse_target
from ..options import Adjoint, Options
from ..readout.collect import read_hidden, read_places
from ..readout.targets import resolve_targets
from ..request import Request, doubt_first_words, fit, make_request, wide_dtype, with_trace
from ..results.continuation import REDUCTIONS, Continuation
from ..results.generation import Generation
from ..runtime.numbers import as_index
from ..trace.record import Trace
from .attribution import attributions


def refuse_beside(*, position: Any, **given: Any) -> None:
    """Refuse arguments of `attribute` that a continuation, whose tokens are the targets, leaves no room for."""
    if is_list_of_positions(position) or as_index(position, "position", POSITIONS) != -1:
        given["position"] = position
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name}: a continuation is read in front of each of its tokens, which are the targets, at the end of "
                f"the model; leave {name} or continuation out."
            )


def attribute_continuation(
    adapter: Adapter,
    tokenizer: Any | None,
    settings: Options,
    prompt: Prompt | Sequence[Prompt] | Trace,
    components: ComponentKind,
    continuation: Any,
    *,
    reduce: str | None,
    method: str | Adjoint | None,
) -> Any:
    """Return the continuation of a prompt, decomposed; a list of them for several prompts.

    Raises:
        ValueError, TypeError: as :meth:`depass_fast.DePass.attribute`.
    """
    began = time.perf_counter()
    if reduce is not None and reduce not in REDUCTIONS:
        raise ValueError(f"reduce: {reduce!r} is not one of None, {', '.join(map(repr, REDUCTIONS))}.")
    if isinstance(prompt, Trace):
        raise TypeError(
            "prompt: a trace is of its own tokens only, and a continuation has more; give text, ids or chat messages. "
            "In a trace of prompt and continuation, read several positions (position=[...])."
        )
    batch, whole, lengths = encode_continued(prompt, continuation, adapter, tokenizer, settings.chat_template_kwargs)
    request = doubt_first_words(make_request(adapter, tokenizer, settings, whole, components, encoded=True))
    request = _read_in_front(replace(request, batch=batch, began=began), lengths)
    results = [
        Continuation.of(steps, length, tokenizer, log_z)
        for (steps, log_z), length in zip(_decomposed(with_method(request, method, 2)), lengths, strict=True)
    ]
    reduced = results if reduce is None else [getattr(one, reduce) for one in results]
    return reduced if batch else reduced[0]


def attribute_generation(
    adapter: Adapter, tokenizer: Any | None, settings: Options, prompt: Prompt, arguments: dict[str, Any]
) -> Generation:
    """Return the generation that ``arguments`` of ``model.generate`` ask for, decomposed.

    Raises:
        ValueError, TypeError: as :meth:`depass_fast.DePass.attribute_generation`.
    """
    began, run = time.perf_counter(), settings.build(adapter)
    if isinstance(prompt, Trace) or is_batch(prompt):
        raise TypeError("prompt: one prompt at a time (text, ids or chat messages) can be continued.")
    check_ready(adapter)
    ids = encode(prompt, adapter, tokenizer, settings.chat_template_kwargs)
    ids, length = generate(adapter, ids, run.progress, **arguments)
    if len(ids) == length:
        raise ValueError("the model generated nothing: raise max_new_tokens, or give another prompt.")
    request = doubt_first_words(make_request(adapter, tokenizer, settings, ids, Tokens(), encoded=True))
    request = replace(request, began=began)
    ((steps, log_z),) = _decomposed(agreed(_read_in_front(request, [length])), generated=True)
    return Generation.of(steps, length, tokenizer, log_z)


def _read_in_front(request: Request, lengths: Sequence[int]) -> Request:
    """Return the request, read in front of every token that follows the first ``lengths`` of its prompts."""
    reads = (tuple(range(n - 1, len(ids) - 1)) for ids, n in zip(request.prompts, lengths, strict=True))
    return replace(request, reads=tuple(reads))


def _decomposed(request: Request, generated: bool = False) -> list[tuple[list[Any], torch.Tensor]]:
    """Decompose prompts that are read in front of all tokens that were given or ``generated``.

    Returns:
        per prompt, an attribution with two targets for every token that follows, its logit and its log-probability,
        and the log partition functions in front of them (T,).
    """
    adapter, tokenizer = request.adapter, request.tokenizer
    request = with_trace(fit(request))
    hidden, dtype = read_hidden(request), wide_dtype(request)
    following = [int(request.prompts[prompt][position + 1]) for prompt, position in request.places]
    targets = [parse_target([token, LogProb(token)], adapter, tokenizer) for token in following]
    for places in read_places(request).ways(adapter, generated):  # compared in each, and all of them the same
        directions = resolve_targets(targets, adapter, tokenizer, places, hidden, dtype)
    log_z = torch.stack([one.log_z for one in directions if one.log_z is not None])  # all have one
    by_prompt = log_z.cpu().split([len(one) for one in request.reads])
    return list(zip(attributions(request, directions), by_prompt, strict=True))
