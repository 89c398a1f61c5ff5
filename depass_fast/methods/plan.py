"""The plan of a request, or of a number of tokens in a prompt's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..adapters import Adapter
from ..chosen_method import choose_method
from ..components.base import ComponentKind
from ..components.model import Tokens
from ..inputs.continuation import encode_continued
from ..inputs.prompts import Prompt, as_positions, encode_all
from ..ledger.given import check_rule, rule_of
from ..options import Adjoint, Options
from ..planning.gemm_rate import gemm_rate
from ..planning.plan import Plan
from ..planning.planner import check_length, known_counts, make_plan
from ..planning.shapes import RunShape
from ..request import check_end, check_kind
from ..runtime.numbers import as_index
from ..trace.first import first_positions
from ..trace.record import Trace
from .continuation import refuse_beside


def plan_of(
    adapter: Adapter,
    tokenizer: Any | None,
    settings: Options,
    prompt_or_length: int | Prompt | Sequence[Prompt] | Trace,
    components: ComponentKind | Literal["ledger"],
    *,
    position: int | Sequence[int] | None,
    end: int | str | None,
    method: str | Adjoint | None,
    measure: bool,
    continuation: Any | None = None,
    n_targets: int = 1,
) -> Plan:
    """Return the plan of a call; arguments as of :meth:`depass_fast.DePass.plan`."""
    ranks = settings.build(adapter).ranks  # checked before any work
    n_targets = as_index(n_targets, "n_targets")
    if n_targets < 1:
        raise ValueError(f"n_targets: {n_targets} is out of range; it is at least 1.")
    is_ledger = components == "ledger"
    if is_ledger:
        method = check_ledger(settings, method, end, continuation)
        components = Tokens()
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
        method=choose_method(
            method, components, adapter, settings, carried, [n_targets * len(of_prompt) for of_prompt in reads]
        ),
        carried=carried,
        reads=reads,
        gradients=n_targets * max(map(len, reads)),
        is_ledger=is_ledger,
        ranks=None if ranks is None else ranks.size,
    )
    return make_plan(shape, gemm_flops=rate, rate_source=source)


def ledger_settings(settings: Options, components: Any, rule: str | None, has_allocation: bool) -> Options:
    """Return the options with the rule of a ledger; ``has_allocation`` says that the call names one by ``allocation``.

    Raises:
        ValueError: ``rule`` is unknown or not linear, or the components are no ledger.
        TypeError: ``rule`` beside ``allocation``.
    """
    if components != "ledger":
        raise ValueError("rule: it is of a plan of 'ledger'; other components take it as allocation=.")
    if has_allocation:
        raise TypeError("rule: it is the allocation of a ledger by another name; leave one of the two out.")
    return replace(settings, allocation=rule_of(rule, settings))


def check_ledger(
    settings: Options, method: str | Adjoint | None, end: int | str | None = None, continuation: Any | None = None
) -> Literal["adjoint"]:
    """Return the method of a ledger.

    Raises:
        ValueError: the rule is not linear; another method; an argument that a ledger does not take.
    """
    for name, value in (("end", end), ("continuation", continuation)):
        if value is not None:
            raise ValueError(f"{name}: a ledger is of a prompt and of all layers; leave {name}= out.")
    check_rule(settings.allocation, "allocation")
    if method not in (None, "adjoint"):
        raise ValueError(f"method: a ledger is made by method='adjoint' alone; got {method!r}.")
    return "adjoint"


def reads_of_positions(position: int | Sequence[int] | None, lengths: Sequence[int]) -> list[list[int]]:
    """Return how many positions there are up to each that is read, for prompts of ``lengths`` tokens; None: all."""
    return [[n] if position is None else [at + 1 for at in as_positions(position, n)] for n in lengths]


def reads_of_continuations(whole: Sequence[Tensor], lengths: Sequence[int]) -> list[list[int]]:
    """Return how many tokens lie before each that follows the ``lengths`` tokens of a prompt; ``whole`` is both."""
    return [list(range(n, len(ids))) for ids, n in zip(whole, lengths, strict=True)]
