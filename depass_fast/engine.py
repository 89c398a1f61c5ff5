"""DePass: capture once, decompose, propagate, read out. The way of the data is this file, top to bottom.

trace (one forward pass, frozen) -> components (initial state) -> layer loop (backend steps) -> readout -> result.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .adapters import adapt, unwrap
from .components.base import ComponentKind
from .components.model import Tokens
from .components.start import initial_state
from .inputs.generation import generate
from .inputs.hook_names import layer_input
from .inputs.loading import check_ready, check_weights, load_model
from .inputs.prompts import Prompt, as_position, encode, encode_all, is_batch
from .inputs.targets import parse_target
from .methods.adjoint import by_adjoint
from .methods.choice import choose_method
from .methods.focus import Focus, Partition, focused, make_partition
from .methods.layers import exact_layers
from .options import Adjoint, Options
from .planning.planner import Plan, plan_call
from .propagation.layer import normalise, through_layer
from .propagation.run import Run
from .readout.collect import Readout, to_results
from .request import Request, bind, fit, make_request
from .results.attribution import Attribution
from .results.generation import Generation
from .results.layered import LayeredAttribution
from .results.verification import warned
from .runtime.dtypes import refuse_autocast
from .runtime.progress import progress_bar
from .state.layout import Layout
from .state.state import ComponentState
from .trace.capture import capture
from .trace.record import Trace


class DePass:
    """Decomposed forward passes through a loaded Hugging Face causal language model of a supported family.

    Args:
        model: in any floating dtype, on any device or devices; never modified. An nnsight `LanguageModel` and a
            TransformerLens `TransformerBridge` stand for the model and the tokenizer inside.
        tokenizer: needed for text prompts, string targets and readable labels only.
        options: defaults for every call, see :class:`depass_fast.Options`.

    Raises:
        ValueError: unsupported family, weights that cannot be read (quantised or offloaded), options out of range.
    """

    def __init__(self, model: nn.Module, tokenizer: Any | None = None, **options: Any) -> None:
        model, tokenizer = unwrap(model, tokenizer)
        self.adapter = adapt(model)
        self.tokenizer = tokenizer
        self.options = Options().updated(options)
        self.options.build(self.adapter)
        check_weights(self.adapter)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        dtype: torch.dtype | str = "auto",
        device_map: Any | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> DePass:
        """Load model and tokenizer from ``path`` (a folder or a hub name). A folder without a tokenizer is fine.

        ``dtype="auto"`` is the stored one; ``model_kwargs`` (revision, token, ...) go to transformers.
        ``device_map="auto"`` over several devices needs accelerate; on one device it does not.
        """
        Options().updated(options)  # before a model is loaded for nothing
        return cls(*load_model(path, dtype=dtype, device_map=device_map, **(model_kwargs or {})), **options)

    @property
    def model(self) -> nn.Module:
        return self.adapter.model

    def trace(self, prompt: Prompt | Sequence[Prompt]) -> Trace:
        """One ordinary forward pass, recorded; it is accepted wherever a prompt is, so that it runs only once."""
        batch, prompts = encode_all(prompt, self.adapter, self.tokenizer)
        return replace(self._capture(prompts), batch=batch)

    def plan(
        self,
        prompt_or_length: int | Prompt | Sequence[Prompt] | Trace,
        components: ComponentKind,
        *,
        end: int | str | None = None,
        method: str | Adjoint | None = None,
        measure: bool = True,
        **options: Any,
    ) -> Plan:
        """What a decomposition of a prompt, or of any of N tokens, will take: FLOP, memory and time, before any work.

        Of an adjoint sweep, what it takes with no loud components, and with as many as are ever carried: how many there
        are depends on the prompt. So does how many components a dictionary or experts have, which a :class:`Trace` in
        the prompt's place tells.

        ``measure`` times a GEMM of this machine once, a fraction of a second, for the estimate of time. Else as
        :meth:`attribute`.
        """
        return plan_call(self, prompt_or_length, components, end, measure, method, options)

    @torch.no_grad()
    def attribute(
        self,
        prompt: Prompt | Sequence[Prompt] | Trace,
        components: ComponentKind,
        target: Any = None,
        *,
        targets: Sequence[Any] | None = None,
        position: int = -1,
        end: int | str | None = None,
        method: str | Adjoint | None = None,
        **options: Any,
    ) -> Attribution | LayeredAttribution | list[Attribution] | list[LayeredAttribution]:
        """The share of every component in the logit of ``target``.

        Args:
            prompt: text, ids (list, or tensor (N,)), chat messages, a :class:`Trace`, or a list of prompts; or what a
                tokenizer returns, ``input_ids`` (B, N) with ``attention_mask``, padded on any side: the padding is
                dropped, and positions count without it.
            components: `Tokens`, `Heads`, `Modules`, `Neurons`, `Subspaces`, `Features` or `Custom`.
            target: None (the model's own next token), an id, a string of one token, a pair (a, b) for the logit
                difference a - b, a vector (D,) that the normed hidden state is projected on, or a list of these.
            targets: one target per prompt of a batch, instead of ``target`` for all.
            position: where the readout happens, -N to N - 1.
            end: read the input of this layer instead (a number, or the name of a residual stream's hook), without the
                final norm; ``target`` must be a vector then.
            method: "exact"; or "adjoint", first-order scores of neurons, features or custom components at the price
                of a few forward passes (docs/adjoint.md), with its numbers as :class:`depass_fast.Adjoint`. None:
                exact, but for several layers with more than 4,096 components in all. The result says which.
            options: overrides of :class:`depass_fast.Options`.

        Returns:
            An :class:`Attribution`, a :class:`LayeredAttribution` for components of several layers; a list of them for
            several prompts, or for the trace of several.

        Raises:
            ValueError, TypeError: bad input, before any work.
            FloatingPointError: NaN or inf in weights or activations, with the layer.
            MemoryError: it cannot fit on the device, whatever the workspace; before any work.
        """
        began = time.perf_counter()
        plan = self._check(prompt, components, end, options)
        reads = [as_position(position, len(ids)) for ids in plan.prompts]
        if targets is not None and (target is not None or len(targets) != len(plan.prompts)):
            raise ValueError(f"targets: expected one per prompt ({len(plan.prompts)}), and no target beside it.")
        wanted = [target] * len(plan.prompts) if targets is None else targets
        specs = [parse_target(t, self.adapter, self.tokenizer) for t in wanted]
        if end is not None and any(vector is None for spec in specs for *_, vector in spec.items):
            raise ValueError("target: at the input of a layer (end=...) only vectors in R^D can be read out.")
        streams = plan.settings.stream is True
        verifies = plan.run.verifier is not None
        rule = plan.run.allocation
        chosen = choose_method(method, components, self.adapter, rule, streams=streams, verifies=verifies)
        if chosen is not None:
            plan = fit(plan, self.adapter, chosen)
            results = by_adjoint(self, plan, reads, specs, chosen, began)
        elif components.is_layered:
            results = exact_layers(self, plan, reads, specs, began)
        else:
            plan = self.traced(fit(plan, self.adapter))
            aim = Readout.of(self, plan, list(enumerate(reads)), specs)
            trace, state = self.start_state(plan)
            done = self.propagate(trace, state, plan.end, plan.run, [[read] for read in reads])
            results = to_results(self, [aim.read(plan, *done)], began)[0]
        return results if plan.batch else results[0]

    @torch.no_grad()
    def attribute_generation(
        self, prompt: Prompt, *, max_new_tokens: int = 20, generation: dict[str, Any] | None = None, **options: Any
    ) -> Generation:
        """Generate, then decompose the whole sequence once: the shares of all earlier tokens in every new one's logit.

        Args:
            prompt: text, ids or chat messages; one.
            max_new_tokens, generation: how to generate; ``generation`` holds further arguments of ``model.generate``,
                as ``{"do_sample": True}``. Default: greedy.
            options: overrides of :class:`depass_fast.Options`.

        Raises:
            ValueError, TypeError: as :meth:`attribute`; more tokens than the model's context; nothing was generated.
        """
        began = time.perf_counter()
        run = self.options.updated(options).build(self.adapter)
        if isinstance(prompt, Trace) or is_batch(prompt):
            raise TypeError("prompt: one prompt at a time (text, ids or chat messages) can be continued.")
        check_ready(self.adapter)
        arguments = {"max_new_tokens": max_new_tokens, "do_sample": False} | (generation or {})
        ids, length = generate(self.adapter, encode(prompt, self.adapter, self.tokenizer), run.progress, **arguments)
        if len(ids) == length:
            raise ValueError("the model generated nothing: raise max_new_tokens, or give another prompt.")
        plan = self.traced(self._plan(ids, Tokens(), None, options))
        reads = range(length - 1, len(ids) - 1)
        specs = [parse_target(int(ids[read + 1]), self.adapter, self.tokenizer) for read in reads]
        aim = Readout.of(self, plan, [(0, read) for read in reads], specs)
        trace, state = self.start_state(plan)
        state, errors = self.propagate(trace, state, plan.end, plan.run, [reads])
        steps = []
        for step, read in enumerate(reads):
            here = state.at(Layout.of(state.layout.components, trace.offsets, [np.array([read])]))
            steps.append(aim.only(step).read(plan, here, errors))
        return Generation.of([one for (one,) in to_results(self, steps, began)], length, self.tokenizer)

    @torch.no_grad()
    def decompose(
        self,
        prompt: Prompt | Sequence[Prompt] | Trace,
        components: ComponentKind,
        *,
        end: int | str | None = None,
        focus: Sequence[int | str] | None = None,
        partition: Partition | None = None,
        **options: Any,
    ) -> ComponentState | Focus:
        """The component state entering layer ``end`` (L: after the last layer); None: after the final norm.

        ``dense(p)`` of the result is (N, M, D) for prompt p. Arguments and errors as in :meth:`attribute`.

        With ``focus``, labels or indices of components, these are carried alone, exactly, and a :class:`Focus` holds
        their states at every layer (before the final norm), without the others; from a ``partition``, or one run more.
        """
        if focus is not None or partition is not None:
            call = self._check(prompt, components, end, options)
            return focused(self, call, [] if focus is None else focus, partition)
        plan = self.traced(self._plan(prompt, components, end, options))
        trace, state = self.start_state(plan)
        state, _ = self.propagate(trace, state, plan.end, plan.run)
        return self._finished(state, trace, end is None, plan.run)

    @torch.no_grad()
    def partition(
        self, prompt: Prompt | Trace, components: ComponentKind, *, end: int | str | None = None, **options: Any
    ) -> Partition:
        """One run over all components that keeps log Z of every layer, for ``decompose(..., focus=, partition=)``.

        Arguments and errors as in :meth:`decompose`; one prompt.
        """
        return make_partition(self, self._check(prompt, components, end, options))

    @torch.no_grad()
    def start(self, trace: Trace, components: ComponentKind, **options: Any) -> ComponentState:
        """The components where they start, as :meth:`carry` takes them. Its rows may be changed.

        Errors as in :meth:`attribute`.
        """
        if not isinstance(trace, Trace):
            raise TypeError(f"trace: expected dp.trace(prompt), got {type(trace).__name__}.")
        call = self._check(trace, components, None, options)
        here = call.components.entry(self.adapter).layer
        fit(replace(call, end_given=here), self.adapter)  # it is carried no further
        state = self.start_state(self.traced(call))[1]
        state.factors = None  # they would no longer hold
        return state

    @torch.no_grad()
    def carry(self, trace: Trace, state: ComponentState, end: int | None = None, **options: Any) -> ComponentState:
        """A state, complete or not, carried to the input of layer ``end``; None: after the final norm. It is used up.

        Raises:
            ValueError: ``end`` does not lie before it, the trace is another model's or of other prompts.
        """
        run = self.options.updated(options).build(self.adapter)
        trace.source.check(self.model)
        if not np.array_equal(state.layout.packed, np.arange(trace.offsets[-1])):
            raise ValueError("state: it does not hold all positions of the trace's prompts.")
        n_layers = self.adapter.n_layers
        first, last = state.layer + (state.site == "resid_mid"), n_layers if end is None else layer_input(end, "end")
        if not first <= last <= n_layers:
            raise ValueError(f"end: {end!r} is out of range; this state reaches layers {first} to {n_layers}.")
        state, _ = self.propagate(trace, state, last, run)
        return self._finished(state, trace, end is None, run)

    @torch.no_grad()
    def propagate(
        self,
        trace: Trace,
        state: ComponentState,
        end: int,
        run: Run,
        reads: Sequence[Sequence[int]] | None = None,
    ) -> tuple[ComponentState, list[Tensor]]:
        """Carry ``state`` to the input of layer ``end``: the layer loop. It is used up, and holds no rows then.

        With ``reads`` (local positions of every prompt) the last layer computes those positions only. Also returned are
        the completeness errors (P,) at the start and after every layer, where the state is.
        """
        run.watch(trace, reads)
        first, queries = state.layer, None
        if reads is not None:
            queries = Layout.of(state.layout.components, trace.offsets, [np.array(r) for r in reads])
        start = trace.resid(first) if state.site == "resid_pre" else trace.resid_at(first, state.site)
        errors = [state.completeness(start)]
        with progress_bar("layers", end - first, run.progress) as shown:
            for index in range(first, end):
                layer = self.adapter.layer(index)
                state.rows = state.rows if run.host else state.rows.to(layer.device)
                kept = queries if index == end - 1 else None
                state = through_layer(state.moved(), layer, trace.layers[index], run, kept)
                errors.append(state.completeness(trace.resid(index + 1)))
                if shown is not None:
                    shown.finish()
        if queries is not None and first == end:
            state = state.at(queries)
        state.factors = None
        return state, [error.to(state.device) for error in errors]

    def _capture(self, prompts: list[Tensor], progress: bool | None = None) -> Trace:
        """The forward pass. ``progress``: with a bar, by default as the options of this object say."""
        refuse_autocast(self.adapter.device)
        check_ready(self.adapter)
        return capture(self.adapter, prompts, self.options.progress if progress is None else progress)

    def _plan(self, prompt: Any, components: ComponentKind, end: int | str | None, options: dict[str, Any]) -> Request:
        """Everything that can be checked before any work, checked; with the workspace that there is room for."""
        return fit(self._check(prompt, components, end, options), self.adapter)

    def _check(self, prompt: Any, components: ComponentKind, end: int | str | None, options: dict[str, Any]) -> Request:
        return make_request(self.adapter, self.tokenizer, self.options.updated(options), prompt, components, end)

    def traced(self, plan: Request) -> Request:
        """With the forward pass, unless it was taken already: that tells which components there are, if they fit."""
        plan.components.single()  # before any work
        return bind(plan, self.adapter, plan.trace or self._capture(plan.prompts, plan.run.progress))

    def start_state(self, plan: Request) -> tuple[Trace, ComponentState]:
        """The trace, and the components where they start."""
        known, run = plan if plan.bound else self.traced(plan), plan.run
        settings = (plan.tokens, plan.excluded, plan.has_bias, run.state_dtype, run.host)
        return known.trace, initial_state(plan.components, self.adapter, known.trace, *settings, known.bound)

    def _finished(self, state: ComponentState, trace: Trace, final_norm: bool, run: Run) -> ComponentState:
        """A state at the end of its way, with what was found of the steps there."""
        found = run.verified()
        warned(found, run.backend.name)
        return replace(self._normed(state, trace) if final_norm else state, verification=found)

    def _normed(self, state: ComponentState, trace: Trace) -> ComponentState:
        """The state after the frozen final norm; in place."""
        normalise(state, self.adapter.final_norm(), trace.resid_final)
        return ComponentState(state.rows, state.layout, state.layer)
