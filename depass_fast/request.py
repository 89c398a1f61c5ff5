"""One call, checked before any work: what is to be done, to which prompts, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .adapters import Adapter
from .components.base import ComponentKind
from .components.start import meets_bias
from .inputs.hook_names import layer_input
from .inputs.prompts import encode_all, token_texts
from .options import Adjoint, Options
from .planning.fit import RunShape, fitted
from .planning.shapes import named_components
from .propagation.run import Run
from .trace.record import Trace


@dataclass(frozen=True)
class Request:
    """What is to be done: ``components`` at ``layer``, carried to the input of layer ``end``.

    ``end_given`` is None where the final norm follows. ``excluded`` are the positions of special tokens, per prompt.
    """

    settings: Options
    run: Run
    batch: bool
    prompts: list[Tensor]
    tokens: list[list[str]]
    excluded: list[set[int]]
    trace: Trace | None
    components: ComponentKind
    layer: int
    end_given: int | None
    end: int
    has_bias: bool
    bound: tuple[ComponentKind, ...] | None = None  # the components of every prompt, known with the trace


def make_request(
    adapter: Adapter, tokenizer: Any, settings: Options, prompt: Any, components: ComponentKind, end: int | str | None
) -> Request:
    """Everything that can be checked before any work, checked.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    run = settings.build(adapter)
    trace = prompt if isinstance(prompt, Trace) else None
    if trace is not None:
        trace.source.check(adapter.model)
        batch, ids = trace.batch, trace.input_ids.cpu()
        prompts = [ids[trace.span(p)] for p in range(trace.n_prompts)]
    else:
        batch, prompts = encode_all(prompt, adapter, tokenizer)
    if not isinstance(components, ComponentKind):
        raise TypeError(f"components: expected Tokens(), Heads(layer), ..., got {components!r}.")
    components.check(adapter, [len(ids) for ids in prompts])
    first, n_layers = components.entry(adapter).first_end, adapter.n_layers
    end = None if end is None else layer_input(end, "end")
    if end is not None and not first <= end <= n_layers:
        raise ValueError(f"end: {end!r} is out of range; these components reach layers {first} to {n_layers}.")
    return Request(
        settings=settings,
        run=run,
        batch=batch,
        prompts=prompts,
        tokens=[token_texts(ids, tokenizer) for ids in prompts],
        excluded=[settings.excluded(len(ids)) for ids in prompts],
        trace=trace,
        components=components,
        layer=components.resolve(adapter),
        end_given=end,
        end=n_layers if end is None else end,
        has_bias=meets_bias(components, adapter, end),
    )


def bind(call: Request, adapter: Adapter, trace: Trace, method: Adjoint | None = None) -> Request:
    """The same call with its trace, and the components that every prompt then has.

    Raises:
        ValueError: several layers were asked for.
        MemoryError: only now it is known how many there are, and that they cannot fit.
    """
    kind = call.components.single()
    bound = tuple(kind.bound(adapter, trace, p) for p in range(trace.n_prompts))
    call = replace(call, trace=trace, bound=bound)
    return call if named_components(kind, adapter, 1)[1] else fit(call, adapter, method)


def fit(call: Request, adapter: Adapter, method: Adjoint | None = None) -> Request:
    """The same call with the workspace that the device has room for; ``method`` None: exact.

    Raises:
        MemoryError: it cannot fit at all; what would is in the message.
    """
    lengths, traced = [len(ids) for ids in call.prompts], call.trace is not None
    counts = None
    if call.bound is not None:
        counts = [len(kind.names(adapter, ids)) for kind, ids in zip(call.bound, call.tokens, strict=True)]
    asked = RunShape(adapter, lengths, call.components, call.settings, call.end_given, traced, counts, method)
    return replace(call, run=fitted(call.run, asked))
