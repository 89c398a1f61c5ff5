"""The plan of a request, or of a number of tokens in a prompt's place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..adapters import Adapter
from ..chosen_method import choose_method
from ..components.base import ComponentKind
from ..inputs.continuation import encode_continued
from ..inputs.prompts import Prompt, as_positions, encode_all
from ..options import Adjoint, Options
from ..planning.gemm_rate import gemm_rate
from ..planning.plan import Plan
from ..planning.planner import check_length, known_counts, make_plan
from ..planning.shapes import RunShape
from ..request import check_end, check_kind
from ..trace.first import first_positions
from ..trace.record import Trace
from .continuation import refuse_beside


def plan_of(
    adapter: Adapter,
    tokenizer: Any | None,
    settings: Options,
    prompt_or_length: int | Prompt | Sequence[Prompt] | Trace,
    components: ComponentKind,
    *,
    position: int | Sequence[int] | None,
    end: int | str | None,
    method: str | Adjoint | None,
    measure: bool,
    continuation: Any | None = None,
) -> Plan:
    """Return the plan of a call; arguments as of :meth:`depass_fast.DePass.plan`."""
    settings.build(adapter)  # before any work
    check_kind(components)
    if continuation is not None:
        refuse_beside(position=-1 if position is None else position, end=end)
    if continuation is not None and isinstance(prompt_or_length, (Trace, int, np.integer)):
        raise ValueError(
            "continuation: it follows a prompt; give the prompt, or the number of tokens of both without continuation."
        )
    reads: list[list[int]] | None = None
    trace = prompt_or_length if isinstance(prompt_or_length, Trace) else None
    if trace is not None:
        lengths = [trace.length(p) for p in range(trace.n_prompts)]
    elif isinstance(prompt_or_length, np.integer):
        lengths = [check_length(int(prompt_or_length), adapter)]
    elif isinstance(prompt_or_length, int):
        lengths = [check_length(prompt_or_length, adapter)]
    elif continuation is not None:
        given = (prompt_or_length, continuation, adapter, tokenizer, settings.chat_template_kwargs)
        _, whole, own = encode_continued(*given)
        lengths, reads = [len(ids) for ids in whole], reads_of_continuations(whole, own)
    else:
        prompts = encode_all(prompt_or_length, adapter, tokenizer, settings.chat_template_kwargs)[1]
        lengths = [len(ids) for ids in prompts]
    components.check(adapter, lengths)
    last = check_end(components, adapter, end)
    reads = reads or reads_of_positions(position, lengths)
    carried = [max(of_prompt) for of_prompt in reads]
    rate, source = None, ""
    if measure:
        rate, source = gemm_rate(adapter.device, settings.dtypes(adapter.dtype, adapter.device)[1])
    shape = RunShape(
        adapter,
        lengths,
        components,
        settings,
        end=last,
        traced=trace is not None,
        counts=None if trace is None else known_counts(components, adapter, first_positions(trace, carried)),
        method=choose_method(method, components, adapter, settings),
        carried=carried,
        reads=reads,
    )
    return make_plan(shape, gemm_flops=rate, rate_source=source)


def reads_of_positions(position: int | Sequence[int] | None, lengths: Sequence[int]) -> list[list[int]]:
    """Return how many positions there are up to each that is read, for prompts of ``lengths`` tokens; None: all."""
    return [[n] if position is None else [at + 1 for at in as_positions(position, n)] for n in lengths]


def reads_of_continuations(whole: Sequence[Tensor], lengths: Sequence[int]) -> list[list[int]]:
    """Return how many tokens lie before each that follows the ``lengths`` tokens of a prompt; ``whole`` is both."""
    return [list(range(n, len(ids))) for ids, n in zip(whole, lengths, strict=True)]
