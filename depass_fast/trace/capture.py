"""One forward pass, recorded. The model is left as it was found, whatever happens.

Prompts of different lengths go through the model as one packed sequence without padding: T positions in all, with
position ids that start over at every prompt and an attention function of our own that never looks past a prompt's
edges. That function also records Q, K and the kind of mask.

Attention that does not go through transformers' interface is observed instead. Its family declares how Q, K and V come
from its projections, and our function's output replaces its own before the output projection. Such a model runs prompt
by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter, looked_up_once, query_key_norms
from ..runtime.progress import progress_bar, progress_bar_of_calls
from . import consistency, end_check, own_pass
from .exclusive import change_config, exclusive, one_at_a_time
from .finite import check_finite
from .hooks import LayerHooks, RecordingHook, full_precision, watch_streams
from .plugged import active, attention_name
from .record import Trace
from .recorder import Recorder
from .spread_check import check_spreads
from .stream_check import check_streams
from .untouched import untouched_pass
from .wide import compute_widely

_COMPARED = 256  # positions of a prompt that also go through the untouched model: later ones depend on these


@looked_up_once()
def capture(adapter: Adapter, prompts: list[Tensor], progress: bool = False) -> Trace:
    """Run the model once over ``prompts`` (ids, each (N,), N ≥ 1) and record what the decomposition freezes.

    The model's attention implementation and hooks are left as they were found, also after an exception or Ctrl-C.
    ``progress`` shows a bar of its layers.

    Raises:
        FloatingPointError: weights or activations hold NaN or inf; the message names the layer.
        RuntimeError: the model's attention did not go through the recorder, or what was recorded does not add up.
    """
    with one_at_a_time:
        computation, longest = consistency.computation(adapter.model), max(map(len, prompts))
        is_checking = not consistency.checked.knows(adapter.model, computation, longest)
        groups = [[prompt] for prompt in prompts] if adapter.one_by_one else [prompts]
        own = None if is_checking else own_pass.admitted(adapter, computation)
        recorder, passes = Recorder(adapter, is_checking), len(groups) + is_checking
        if own is not None:
            with progress_bar("forward pass", passes * adapter.n_layers, progress) as bar, exclusive(adapter):
                return _run(recorder, groups, partial(own.run, recorder, done=None if bar is None else bar.finish))
        with progress_bar_of_calls("forward pass", adapter.blocks, passes, progress):
            with _recording(adapter, recorder):
                trace = _run(recorder, groups, lambda ids, positions: adapter.run(ids[None], positions[None]))
            if is_checking:
                _check(recorder, trace, prompts)
        if is_checking:
            consistency.checked.remember(adapter.model, computation, longest)
            own_pass.admit(adapter, computation, trace, recorder.layers)
        return trace


@torch.no_grad()
def _run(recorder: Recorder, groups: list[list[Tensor]], run: Callable[[Tensor, Tensor], None]) -> Trace:
    """Record groups of prompts, one group after the other; the prompts of a group go through the model together.

    ``run`` takes packed ids and positions (T,) through it.
    """
    adapter, prompts = recorder.adapter, [prompt for group in groups for prompt in group]
    for group in groups:
        recorder.enter([len(prompt) for prompt in group])
        positions = torch.cat([torch.arange(n, device="cpu") for n in recorder.lengths]).to(adapter.device)
        run(torch.cat(group).to(adapter.device), positions)
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in prompts])]).astype(np.int64)
    trace = recorder.trace(torch.cat(prompts).to(adapter.device), offsets)
    check_finite(adapter, trace)
    return trace


def _check(recorder: Recorder, trace: Trace, prompts: list[Tensor]) -> None:
    """Raise RuntimeError unless the model computes what its family declares, and a traced pass ends as another one."""
    adapter, found = recorder.adapter, (recorder.layers, recorder.positions)
    consistency.check(adapter, trace, *found)
    check_streams(adapter, trace, *found)
    check_spreads(adapter, trace, *found)
    compared = prompts[-1] if adapter.one_by_one else prompts[-1][:_COMPARED]
    end_check.check_end(trace, recorder.layers, untouched_pass(adapter, compared.to(adapter.device)), adapter.dtype)


@contextmanager
def _recording(adapter: Adapter, recorder: Recorder) -> Iterator[None]:
    """Hook the model up to ``recorder``, and undo all of it at the end, whatever happens in between."""
    with exclusive(adapter) as undo:
        for index in range(adapter.n_layers):
            LayerHooks(adapter, index, recorder, undo).put()
        watch_streams(adapter, recorder, undo)
        end = adapter.final_norm_module
        if end is None:
            undo.callback(RecordingHook(recorder, recorder.final, "resid_final").after(adapter.end_module))
        else:
            undo.callback(RecordingHook(recorder, recorder.final, "resid_final").before(end))
        if adapter.dtype == torch.float64:
            for module, norm in (*adapter.norms(), *adapter.stream_norms(), *query_key_norms(adapter)):
                undo.callback(module.register_forward_hook(full_precision(norm)).remove)
            for index in range(adapter.n_layers):
                compute_widely(adapter, index, undo)
        if end is not None:
            undo.callback(RecordingHook(recorder, recorder.final, "normed_final").after(end))
        if adapter.observed is None:
            change_config(adapter, "_attn_implementation", attention_name(adapter), undo)
        undo.callback(setattr, active, "recorder", getattr(active, "recorder", None))
        active.recorder = recorder
        yield
