"""Attribution under a linear rule: exact scores of all components by one way back (docs/rules.md)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ..adapters import looked_up_once
from ..components.base import ComponentKind, Entry
from ..components.start import each_meets_bias
from ..readout.assemble import assemble
from ..readout.collect import how_computed
from ..readout.completeness import warn_if_logits_miss
from ..readout.targets import Directions
from ..request import Request, at_layer, fit, wide_dtype, with_trace
from ..results.attribution import Attribution
from ..results.layered import LayeredAttribution, warnings_of_layers
from ..runtime.budget import Budget
from ..runtime.precision import full_precision
from ..runtime.progress import Parts, progress_bar
from ..runtime.transfer import to_host
from .answers import Shares, shares_of, wanted_of
from .pages import Pages, Wanted
from .reads import Reads
from .steering import Steers
from .walk import walk_back

CPU_WORKSPACE, GPU_WORKSPACE = 1 << 27, 1 << 30
_LEAST_WORKSPACE = 1 << 20
_ADVICE = "the trace and the gradients do not fit. Take shorter prompts, fewer of them, or fewer targets at once."


def attribute(
    request: Request, directions: Sequence[Directions] | None = None
) -> list[list[Attribution]] | list[list[LayeredAttribution]]:
    """Return a result per read of every prompt; ``directions``, one per read, stand for the targets."""
    request = with_trace(fit(request))
    kinds, reads = request.components.each(request.adapter), Reads.of(request, directions)
    pages = way_back(request, reads, wanted_of(kinds, request.adapter))
    return read_off(request, kinds, [reads] * len(kinds), pages)


@looked_up_once()
def way_back(request: Request, reads: Reads, wanted: Wanted, steers: Steers | None = None) -> Pages:
    """Take the way back of a traced request. One that runs out of memory is begun again with half the workspace.

    ``steers`` opens the book of attention, see :func:`walk_back`.
    """
    run, adapter, wide = request.run, request.adapter, wide_dtype(request)
    rule, compute = run.allocation.linear_rule, run.compute_dtype or wide
    assert rule is not None, "the method was chosen by the rule"
    n_layers = max(1, request.end - wanted.last.layer)

    def walk() -> Pages:
        with progress_bar("layers", 1, run.progress):
            given = (rule, wanted, compute, budget.bytes(adapter.device), Parts(n_layers))
            return walk_back(adapter, request.require_trace(), reads.packing, reads.seeds, request.end, *given, steers)

    default = CPU_WORKSPACE if adapter.device.type == "cpu" else GPU_WORKSPACE
    budget = Budget(run.memory_budget, lambda _: default, _release, _LEAST_WORKSPACE, _ADVICE)
    return budget.prepare(adapter.device, walk)


@looked_up_once()
def read_off(
    request: Request,
    kinds: Sequence[ComponentKind],
    reads: Sequence[Reads],
    pages: Pages,
    prompts: Sequence[int] | None = None,
) -> list[list[Attribution]] | list[list[LayeredAttribution]]:
    """Return the results of ``kinds``, the components of a request, from the pages of its way back.

    ``reads`` say, for each of the kinds, what its scores sum to. Results are those of ``prompts``, by default of all.
    """
    adapter, trace = request.adapter, request.require_trace()
    prompts = range(trace.n_prompts) if prompts is None else prompts
    ahead = each_meets_bias(kinds, adapter, request.end_given, request.run.allocation)
    ahead = [meets or _has_constants(pages, kind.entry(adapter)) for meets, kind in zip(ahead, kinds, strict=True)]
    shares = [
        shares_of(pages, kind, adapter, trace, prompt, request.tokens[prompt], meets)
        for kind, meets in zip(kinds, ahead, strict=True)
        for prompt in prompts
    ]
    by_layer = _results(request, kinds, prompts, shares, reads, pages.off if pages.changes else 0.0)
    if not request.components.is_layered:
        return by_layer[0]
    return [
        [LayeredAttribution(list(each), warnings=warnings_of_layers(each)) for each in zip(*of_prompt, strict=True)]
        for of_prompt in zip(*by_layer, strict=True)
    ]


@full_precision()
def _results(
    request: Request,
    kinds: Sequence[ComponentKind],
    prompts: Sequence[int],
    shares: Sequence[Shares],
    every: Sequence[Reads],
    start: float,
) -> list[list[list[Attribution]]]:
    """Return a result per layer, prompt and read; ``shares`` are those of every layer, prompt by prompt.

    ``start`` is an error that was there before, see :func:`warn_if_logits_miss`.

    Everything is copied to the host at once.
    """
    scores = to_host([one.columns() for one in shares])
    seconds = time.perf_counter() - request.began
    places = list(zip(every[0].readout.places, range(len(every[0].rows)), strict=True))
    found = []
    for number, (one, columns) in enumerate(zip(shares, scores, strict=True)):
        kind, prompt = kinds[number // len(prompts)], prompts[number % len(prompts)]
        reads = every[number // len(prompts)]
        if one.has_bias:
            columns[:, -1] += reads.constants[:, prompt]
        of_kind = at_layer(request, kind)
        found.append(
            [
                assemble(
                    scores=columns[reads.rows[place]],
                    logits=reads.readout.logits[place],
                    layer_errors=torch.zeros(0, device="cpu"),
                    directions=reads.readout.directions[place],
                    labels=one.all_labels,
                    input_ids=request.prompts[prompt].tolist(),
                    tokens=request.tokens[prompt],
                    layer=kind.resolve(request.adapter),
                    position=position,
                    seconds=seconds,
                    method="adjoint",
                    **how_computed(of_kind, prompt),
                )
                for (of, position), place in places
                if of == prompt
            ]
        )
    sizes = [
        reads.readout.sizes[place] for reads in every for prompt in prompts for (of, _), place in places if of == prompt
    ]
    flat = [result for of_prompt in found for result in of_prompt]
    computed = request.run.compute_dtype or wide_dtype(request)
    warn_if_logits_miss(request, list(zip(flat, sizes, strict=True)), computed, start)
    return [found[first : first + len(prompts)] for first in range(0, len(found), len(prompts))]


def _has_constants(pages: Pages, site: Entry) -> bool:
    """Return if the book of attention has credit behind a site that is no component's: places, sinks, constants."""
    return site in pages.changes and bool((pages.constants[site] != 0).any())


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
