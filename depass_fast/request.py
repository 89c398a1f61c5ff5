"""A request: what is to be decomposed and how, checked before any work; its forward pass, and its initial state."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .adapters import Adapter
from .components.base import ComponentKind
from .components.dealt import dealt_state
from .components.model import Tokens
from .components.start import initial_state, meets_bias
from .inputs.doubts import doubt_first_word, doubt_missing_space, is_special
from .inputs.hook_names import layer_input
from .inputs.loading import check_ready
from .inputs.prompts import Prompt, as_positions, encode_all
from .inputs.provenance import provenance_of
from .inputs.targets import TargetSpec, parse_target, texts_in
from .inputs.token_texts import lacks_space, token_texts
from .options import Adjoint, Options
from .planning.fit import fitted
from .planning.shapes import RunShape, named_components
from .propagation.run import Run
from .results.provenance import Provenance
from .runtime.dtypes import refuse_autocast
from .runtime.precision import full_precision
from .state.state import ComponentState
from .trace.activations import check_activations
from .trace.capture import capture
from .trace.first import first_positions
from .trace.record import Trace


@dataclass(frozen=True)
class Request:
    """The components at ``layer`` of ``prompts``, to be carried to the input of layer ``end``.

    ``settings`` are the options as they were given, ``run`` the same checked. ``tokens`` are the texts of every
    prompt's tokens, ``excluded`` the positions of its special tokens. ``end_given`` is None where the final norm
    follows. ``has_bias`` says that constants are still to come. ``method`` None is exact propagation.

    ``reads`` and ``targets`` are what an attribution reads: one or several positions and a target per prompt. Nothing
    looks ahead, so that positions behind the last one that is read are not carried (:attr:`carried`).

    ``trace`` is there once the forward pass was taken, of the positions that are carried; ``bound`` are then the
    components of every prompt, where they were asked for at one layer. ``finals`` (T, D) are the normed final hidden
    states of all positions of the prompts, also of those that are not carried. ``began`` is the time when the request
    was made, in seconds. ``provenance`` says which model and packages compute it.
    """

    adapter: Adapter
    tokenizer: Any | None
    settings: Options
    run: Run
    batch: bool
    prompts: list[Tensor]
    tokens: list[list[str]]
    excluded: list[set[int]]
    components: ComponentKind
    layer: int
    end_given: int | None
    end: int
    has_bias: bool
    provenance: Provenance
    method: Adjoint | None = None
    reads: tuple[tuple[int, ...], ...] = ()
    targets: tuple[TargetSpec, ...] = ()
    trace: Trace | None = None
    bound: tuple[ComponentKind, ...] | None = None
    finals: Tensor | None = None
    began: float = field(default_factory=time.perf_counter)

    def require_trace(self) -> Trace:
        """Return the trace, which is there by now."""
        assert self.trace is not None, "the forward pass was not taken yet"
        return self.trace

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """The prompt and the position of everything that is read, prompt by prompt."""
        return tuple((prompt, position) for prompt, reads in enumerate(self.reads) for position in reads)

    @property
    def read_positions(self) -> list[list[int]]:
        """The positions of every prompt that are read, each once and in order."""
        return [sorted(set(reads)) for reads in self.reads]

    @property
    def carried(self) -> list[int]:
        """The number of positions of every prompt that are carried: those up to the last one that is read, or all."""
        return [max(reads) + 1 for reads in self.reads] or [len(ids) for ids in self.prompts]


def make_request(
    adapter: Adapter,
    tokenizer: Any | None,
    settings: Options,
    prompt: Prompt | Sequence[Prompt] | Trace,
    components: ComponentKind,
    end: int | str | None = None,
    *,
    encoded: bool = False,
) -> Request:
    """Check everything that can be checked before any work.

    ``encoded`` says that the prompt is the ids (N,) of one that was checked before, or a list of these.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    began, run = time.perf_counter(), settings.build(adapter)
    trace = prompt if isinstance(prompt, Trace) else None
    if trace is not None:
        trace.source.check(adapter.model)
        batch, ids = trace.batch, trace.input_ids.cpu()
        prompts = [ids[trace.span(p)] for p in range(trace.n_prompts)]
    elif encoded:
        batch, prompts = False, cast("list[Tensor]", prompt if isinstance(prompt, list) else [prompt])
    else:
        batch, prompts = encode_all(prompt, adapter, tokenizer, settings.chat_template_kwargs)
    check_kind(components)
    components.check(adapter, [len(ids) for ids in prompts])
    last = check_end(components, adapter, end)
    return Request(
        adapter=adapter,
        tokenizer=tokenizer,
        settings=settings,
        run=run,
        batch=batch,
        prompts=prompts,
        tokens=[token_texts(ids, tokenizer) for ids in prompts],
        excluded=[settings.excluded(len(ids)) for ids in prompts],
        components=components,
        layer=components.resolve(adapter),
        end_given=last,
        end=adapter.n_layers if last is None else last,
        has_bias=meets_bias(components, adapter, last, run.allocation),
        provenance=provenance_of(adapter),
        trace=trace,
        began=began,
    )


def doubt_first_words(request: Request) -> Request:
    """Return the request. Warn where the first token of a prompt is kept apart as a start token, and is none."""
    if keeps_first_apart(request.adapter, request.components, request.settings, request.end):
        carried = [ids[:n] for ids, n in zip(request.prompts, request.carried, strict=True)]
        doubt_first_word(carried, request.tokenizer)
    return request


def keeps_first_apart(adapter: Adapter, components: ComponentKind, settings: Options, end: int) -> bool:
    """True if the first token takes no part in the allocation of some MLP in front of layer ``end``: the default."""
    if not isinstance(components, Tokens) or settings.exclude_special is not True:
        return False
    if settings.build(adapter).allocation.linear_rule is not None:
        return False
    return any(map(adapter.has_mlp, range(components.resolve(adapter), end)))


def _doubt_spaces(request: Request, targets: Sequence[Any], argument: str) -> None:
    """Warn of words in each prompt's ``targets``, this ``argument``, that lack the space of a word of its own."""
    found: dict[str, str] = {}
    for ids, tokens, target, reads in zip(request.prompts, request.tokens, targets, request.reads, strict=True):
        for text in texts_in(target):
            before, token = tokens[reads[-1]], int(ids[reads[-1]])
            if lacks_space(text, before, request.tokenizer) and not is_special(token, request.tokenizer):
                found.setdefault(text, before)
    for text, before in found.items():
        doubt_missing_space(text, before, argument)


def with_targets(
    request: Request,
    target: Any,
    *,
    contrast: Any = None,
    targets: Sequence[Any] | None = None,
    position: int | Sequence[int] = -1,
) -> Request:
    """Return the request with what is to be read, checked. Arguments as of :meth:`depass_fast.DePass.attribute`.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    count = len(request.prompts)
    if targets is not None and (isinstance(targets, str) or not isinstance(targets, Sequence | np.ndarray | Tensor)):
        raise TypeError(
            f"targets: expected a list with one target per prompt, got {targets!r}. A text of several tokens is given "
            "to attribute(..., continuation=...)."
        )
    if targets is not None and (target is not None or len(targets) != count):
        raise ValueError(f"targets: expected one per prompt ({count}), and no target beside it.")
    wanted = [target] * count if targets is None else targets
    width = None if request.end_given is None else request.adapter.stream_width
    specs = tuple(parse_target(one, request.adapter, request.tokenizer, contrast, width) for one in wanted)
    if request.end_given is not None and any(item.vector is None for spec in specs for item in spec.items):
        raise ValueError(
            "target: at the input of a layer (end=...) only vectors in R^D can be read out; logits and "
            "log-probabilities exist behind the final norm only. Give a vector, or leave end out."
        )
    reads = tuple(tuple(as_positions(position, len(ids))) for ids in request.prompts)
    request = replace(request, reads=reads, targets=specs)
    _doubt_spaces(request, wanted, "target" if targets is None else "targets")
    _doubt_spaces(request, [contrast] * count, "contrast")
    return request


def check_kind(components: Any) -> None:
    """Raise TypeError unless ``components`` is a component kind."""
    if not isinstance(components, ComponentKind):
        raise TypeError(f"components: expected Tokens(), Heads(layer), ..., got {components!r}.")


def check_end(components: ComponentKind, adapter: Adapter, end: int | str | None) -> int | None:
    """Return the layer that ``end`` names; None: after the final norm.

    Raises:
        ValueError: the components never reach it.
    """
    if end is None:
        return None
    last = layer_input(end, "end")
    components.entry(adapter).check_end(last, adapter.n_layers, "these components", end)
    return last


def fit(request: Request, counts: Sequence[int] | None = None, is_ledger: bool = False, books: int = 1) -> Request:
    """Return the request with the workspace that the device has room for, on every rank of several.

    ``counts`` are the named components of every prompt, where they are known; by default those that are ``bound``.
    ``is_ledger``: all components of all kinds are asked for, whatever the request says, in so many ``books``.

    Raises:
        MemoryError: it cannot fit at all; the message says what would.
    """
    if counts is None and request.bound is not None:
        bound = zip(request.bound, carried_tokens(request), strict=True)
        counts = [len(kind.names(request.adapter, texts)) for kind, texts in bound]
    shape = RunShape(
        request.adapter,
        [len(ids) for ids in request.prompts],
        request.components,
        request.settings,
        request.end_given,
        traced=request.trace is not None,
        counts=counts,
        method=request.method,
        carried=request.carried,
        reads=[[position + 1 for position in reads] for reads in request.reads] or None,
        gradients=books * max(gradients_of(request), default=1),
        is_ledger=is_ledger,
        ranks=None if (ranks := request.run.ranks) is None else ranks.size,
    )
    if ranks is None:
        return replace(request, run=fitted(request.run, shape))
    return replace(request, run=ranks.together(lambda: fitted(request.run, shape)))


def gradients_of(request: Request) -> list[int]:
    """Return how many gradients each prompt would need: one for every target of every read."""
    counts = [len(spec.items) for spec in request.targets] or [1] * len(request.reads)
    return [len(reads) * count for reads, count in zip(request.reads, counts, strict=True)]


def take_trace(adapter: Adapter, prompts: list[Tensor], progress: bool) -> Trace:
    """Take the forward pass over ``prompts``, with a bar if ``progress``."""
    refuse_autocast(adapter.device)
    check_ready(adapter)
    return capture(adapter, prompts, progress)


def with_trace(request: Request) -> Request:
    """Return the request with its forward pass, unless it was taken already, at the positions that are carried."""
    trace = request.trace
    if trace is None:
        trace = take_trace(request.adapter, request.prompts, request.run.progress)
    if request.run.allocation.needs_activations:
        check_activations(request.adapter, trace)
    finals = trace.normed_final if request.finals is None else request.finals
    return replace(request, trace=first_positions(trace, request.carried), finals=finals)


def traced(request: Request) -> Request:
    """Return a request of one layer with its forward pass, and with the components that every prompt then has.

    Raises:
        ValueError: several layers were asked for; before any work.
        MemoryError: only now it is known how many components there are, and they cannot fit.
    """
    kind = request.components.single()
    request = with_trace(request)
    adapter, trace = request.adapter, request.require_trace()
    bound = tuple(kind.bound(adapter, trace, prompt) for prompt in range(trace.n_prompts))
    request = replace(request, bound=bound)
    return request if named_components(kind, adapter, 1)[1] else fit(request)


@full_precision()
def start(request: Request) -> ComponentState:
    """Return the components of a traced request where they start: all, or those that are dealt to this rank."""
    kind, adapter, trace, ranks = request.components, request.adapter, request.require_trace(), request.run.ranks
    more = {
        "has_bias": request.has_bias,
        "dtype": request.run.state_dtype,
        "tokens": carried_tokens(request),
        "excluded": [{at for at in one if at < n} for one, n in zip(request.excluded, request.carried, strict=True)],
        "in_host_memory": request.run.host,
    }
    if ranks is None:
        return initial_state(kind, adapter, trace, bound=request.bound, **more)
    bound = request.bound or [kind.bound(adapter, trace, prompt) for prompt in range(trace.n_prompts)]
    return dealt_state(kind, adapter, trace, ranks, bound=bound, **more)


def carried_tokens(request: Request) -> list[list[str]]:
    """Return the texts of the tokens that are carried."""
    return [texts[:n] for texts, n in zip(request.tokens, request.carried, strict=True)]


def wide_dtype(request: Request) -> torch.dtype:
    """The dtype of scores: that of the state, float32 at least. No share is rounded to half precision."""
    return torch.promote_types(request.run.state_dtype, torch.float32)


def at_layer(request: Request, kind: ComponentKind) -> Request:
    """Return the request of one layer's components out of those of several."""
    return replace(request, components=kind, layer=kind.resolve(request.adapter))
