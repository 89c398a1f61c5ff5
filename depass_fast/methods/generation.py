"""Generate, then decompose the whole sequence once: the shares of earlier tokens in every new one's logit."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from ..adapters import Adapter
from ..components.model import Tokens
from ..inputs.generation import generate
from ..inputs.loading import check_ready
from ..inputs.prompts import Prompt, encode, is_batch
from ..inputs.targets import parse_target
from ..options import Options
from ..propagation.loop import propagate
from ..readout.collect import Readout, to_results
from ..request import fit, make_request, start, traced
from ..results.generation import Generation
from ..state.layout import Layout
from ..trace.record import Trace


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
    request = replace(make_request(adapter, tokenizer, settings, ids, Tokens(), encoded=True), began=began)
    request = traced(fit(request))
    trace, reads = request.require_trace(), range(length - 1, len(ids) - 1)
    targets = [parse_target(int(ids[read + 1]), adapter, tokenizer) for read in reads]
    readout = Readout.of(request, [(0, read) for read in reads], targets)
    state, errors = propagate(adapter, trace, start(request), request.end, request.run, [reads])
    collected = []
    for step, read in enumerate(reads):
        here = state.at(Layout.of(state.layout.components, trace.offsets, [np.array([read])]))
        collected.append(readout.only(step).collect([request], here, [errors]))
    return Generation.of([result for (result,) in to_results(collected)], length, tokenizer)
