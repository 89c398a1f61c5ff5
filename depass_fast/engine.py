"""DePass: the library's front door. Every call is checked here, and done by one of the methods."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from torch import nn

from .adapters import adapt, unwrap
from .attention_calls import AttentionCalls
from .chosen_method import with_method
from .components.base import ComponentKind, LayerKind, R
from .components.custom import Custom
from .components.model import Tokens
from .graph_calls import GraphCalls
from .inputs.generation import generation_arguments
from .inputs.loading import as_tokenizer, check_weights, load_model
from .inputs.prompts import OnePrompt, Prompt, SeveralPrompts, encode_all, is_list_of_positions
from .ledger.book import Ledger
from .ledger.given import check_options, refuse_arguments, rule_of
from .methods import continuation as continuations
from .methods.attribution import attributions
from .methods.continuation import attribute_continuation, refuse_beside
from .methods.plan import ledger_settings, plan_of
from .options import Adjoint, CallValues, LinearRuleName, MethodName, Options, OptionValues
from .planning.plan import Plan
from .report_calls import ReportCalls
from .request import Request, doubt_first_words, make_request, take_trace, with_targets
from .results.attribution import Attribution
from .results.continuation import Continuation
from .results.generation import Generation
from .results.layered import LayeredAttribution
from .runtime.dtypes import dtype_name
from .state_calls import StateCalls
from .sweep_calls import SweepCalls
from .trace.record import Trace

if TYPE_CHECKING:
    from typing_extensions import Unpack

Given: TypeAlias = str | Sequence[int]
OneLayer: TypeAlias = Tokens | Custom  # kinds of a single layer, as type checkers tell them apart


class DePass(StateCalls, AttentionCalls, GraphCalls, ReportCalls, SweepCalls):
    """Decomposed forward passes through a loaded Hugging Face causal language model of a supported family.

    Args:
        model: in any floating dtype, on any device or devices; never modified. An nnsight `LanguageModel` and a
            TransformerLens `TransformerBridge` stand for the model and the tokenizer inside.
        tokenizer: needed for text prompts, string targets and readable labels only. A processor stands for the one
            that it holds, a path or a hub name for the one that is loaded from there.
        options: defaults for every call, see :class:`depass_fast.Options`.

    Raises:
        ValueError: unsupported family, weights that cannot be read (quantised or offloaded), options out of range.
    """

    def __init__(self, model: nn.Module, tokenizer: Any | None = None, **options: Unpack[OptionValues]) -> None:
        model, tokenizer = unwrap(model, tokenizer)
        self.adapter = adapt(model)
        self.tokenizer = as_tokenizer(tokenizer)
        self.options = Options().updated(options)
        self.options.build(self.adapter)
        check_weights(self.adapter)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str = "auto",
        device_map: Any | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **options: Unpack[OptionValues],
    ) -> DePass:
        """Load model and tokenizer from ``path``: a folder, a hub name, or a file whose name ends in .gguf.

        A folder without a tokenizer is fine. ``dtype="auto"`` is the stored one, and float32 for a GGUF file, whose
        weights are dequantised. ``model_kwargs`` (revision, token, gguf_file, ...) go to transformers.
        ``device_map="auto"`` over several devices needs accelerate; on one device it does not.

        Raises:
            FileNotFoundError, ValueError: no such GGUF file, or one that transformers cannot load.
            ImportError: a GGUF file without the packages of the extra ``gguf``, several devices without accelerate.
            OSError: as transformers raises it.
        """
        Options().updated(options)  # before a model is loaded for nothing
        model, tokenizer = load_model(path, dtype=dtype, device_map=device_map, **(model_kwargs or {}))
        return cls(model, tokenizer, **options)

    def __repr__(self) -> str:
        tokenizer, a = type(self.tokenizer).__name__ if self.tokenizer is not None else "no tokenizer", self.adapter
        model = f"{type(a.model).__name__} of {a.n_layers} layers, {dtype_name(a.dtype)} on {a.device}"
        return f"DePass({model}, {tokenizer}, {self.options!r})"

    @property
    def model(self) -> nn.Module:
        """The Hugging Face model."""
        return self.adapter.model

    def trace(self, prompt: Prompt | Sequence[Prompt], **options: Unpack[OptionValues]) -> Trace:
        """Take one ordinary forward pass and record it. A trace is accepted wherever a prompt is: it runs only once."""
        settings = self.options.updated(options)
        settings.build(self.adapter)
        batch, prompts = encode_all(prompt, self.adapter, self.tokenizer, settings.chat_template_kwargs)
        trace = take_trace(self.adapter, prompts, settings.progress)
        return replace(trace, batch=batch, source=trace.source.sampled(self.model))

    def plan(
        self,
        prompt_or_length: int | Prompt | Sequence[Prompt] | Trace,
        components: ComponentKind | Literal["ledger"],
        *,
        position: int | Sequence[int] | None = None,
        end: int | str | None = None,
        method: MethodName | Adjoint | None = None,
        measure: bool = True,
        continuation: Any | None = None,
        n_targets: int = 1,
        rule: LinearRuleName | None = None,
        **options: Unpack[OptionValues],
    ) -> Plan:
        """Predict FLOP, memory and time of a decomposition of a prompt, or of any of N tokens, before any work.

        An adjoint sweep is planned twice, with no loud components and with as many as are ever carried: how many there
        are depends on the prompt. So does how many components a dictionary or experts have, which a :class:`Trace` in
        the prompt's place tells. ``position`` is what is read, behind which nothing is carried; None: the last.
        ``n_targets`` is the number of targets at every position: a linear rule carries a gradient for each.

        ``components`` "ledger" plans :meth:`ledger` under ``rule``, or under the ``allocation`` that is given; by
        default under the engine's own one where that is linear, else "shapley".

        ``measure`` times a GEMM of this machine once, a fraction of a second, for the estimate of time. With a
        ``continuation`` it is the plan of both. Other arguments and errors as in :meth:`attribute`.
        """
        settings = self.options.updated(options)
        if rule is not None or (components == "ledger" and "allocation" not in options):
            settings = ledger_settings(settings, components, rule, "allocation" in options)
        return plan_of(
            self.adapter,
            self.tokenizer,
            settings,
            prompt_or_length,
            components,
            position=position,
            end=end,
            method=method,
            measure=measure,
            continuation=continuation,
            n_targets=n_targets,
        )

    @overload
    def attribute(
        self,
        prompt: OnePrompt,
        components: OneLayer,
        target: Any = None,
        *,
        position: int = -1,
        **more: Unpack[CallValues],
    ) -> Attribution: ...

    @overload
    def attribute(
        self,
        prompt: OnePrompt,
        components: LayerKind[R],
        target: Any = None,
        *,
        position: int = -1,
        **more: Unpack[CallValues],
    ) -> R: ...

    @overload
    def attribute(
        self,
        prompt: SeveralPrompts,
        components: OneLayer,
        target: Any = None,
        *,
        position: int = -1,
        **more: Unpack[CallValues],
    ) -> list[Attribution]: ...

    @overload
    def attribute(
        self,
        prompt: SeveralPrompts,
        components: LayerKind[R],
        target: Any = None,
        *,
        position: int = -1,
        **more: Unpack[CallValues],
    ) -> list[R]: ...

    @overload
    def attribute(
        self,
        prompt: OnePrompt,
        components: OneLayer,
        target: Any = None,
        *,
        position: Sequence[int],
        **more: Unpack[CallValues],
    ) -> list[Attribution]: ...

    @overload
    def attribute(
        self,
        prompt: OnePrompt,
        components: LayerKind[R],
        target: Any = None,
        *,
        position: Sequence[int],
        **more: Unpack[CallValues],
    ) -> list[R]: ...

    @overload
    def attribute(
        self, prompt: OnePrompt, components: OneLayer, *, continuation: Given, **more: Unpack[CallValues]
    ) -> Continuation[Attribution]: ...

    @overload
    def attribute(
        self, prompt: OnePrompt, components: LayerKind[R], *, continuation: Given, **more: Unpack[CallValues]
    ) -> Continuation[R]: ...

    @overload
    def attribute(
        self,
        prompt: Prompt | Sequence[Prompt] | Trace,
        components: ComponentKind,
        target: Any = None,
        *,
        position: int | Sequence[int] = -1,
        continuation: Any | None = None,
        reduce: Literal["sum", "mean"] | None = None,
        **more: Unpack[CallValues],
    ) -> Any: ...

    @torch.no_grad()
    def attribute(
        self,
        prompt: Prompt | Sequence[Prompt] | Trace,
        components: ComponentKind,
        target: Any = None,
        *,
        contrast: int | str | None = None,
        targets: Sequence[Any] | None = None,
        position: int | Sequence[int] = -1,
        continuation: Any | None = None,
        reduce: Literal["sum", "mean"] | None = None,
        end: int | str | None = None,
        method: MethodName | Adjoint | None = None,
        **options: Unpack[OptionValues],
    ) -> Attribution | LayeredAttribution | Continuation | list[Any]:
        """Return the share of every component in the logit of ``target``, or in every token of a ``continuation``.

        Args:
            prompt: text, ids (list, or tensor (N,)), chat messages (a last one of the assistant's is continued), a
                :class:`Trace`, or a list of prompts; or what a tokenizer returns, ``input_ids`` (B, N) with
                ``attention_mask``, padded on any side: the padding is dropped, and positions count without it.
            components: `Tokens`, `Heads`, `Modules`, `Neurons`, `Subspaces`, `Features` or `Custom`.
            target: None (the model's own next token), an id, a string of one token, a `LogProb`, a `Contrast` or a pair
                (a, b) for the logit difference a - b, a vector (D,) that the normed hidden state is projected on, or a
                list of these.
            contrast: an id or a string of one token, whose logit is subtracted from the target's.
            targets: one target per prompt of a batch, instead of ``target`` for all.
            position: where the readout happens, -N to N - 1; or a list, of one decomposition for all of them. Positions
                behind the last one are not carried.
            continuation: text or ids (T,) that follow the prompt, whose T tokens are the targets; or a list of these,
                one per prompt. Components are those of prompt and continuation. Goes without ``target`` and the like.
            reduce: "sum" or "mean" of the log-probabilities of the continuation, as one result.
            end: read the input of this layer instead (a number, or the name of a residual stream's hook), without the
                final norm; ``target`` must be a vector then.
            method: "exact"; or "adjoint": under the softmax first-order scores of neurons, features or custom
                components at the price of a few forward passes (docs/adjoint.md), with its numbers as
                :class:`depass_fast.Adjoint`; under a linear rule exact scores of all kinds. None: exact, but adjoint
                for several layers with more than 4,096 neurons or features in all, and under a linear rule where that
                is cheaper. The result says which.
            options: overrides of :class:`depass_fast.Options`.

        Returns:
            An :class:`Attribution`, a :class:`LayeredAttribution` for components of several layers, a
            :class:`Continuation` of either with ``continuation``. For a list of positions a list of them, in its
            order; for several prompts, or for the trace of several, a list of what one prompt gives.

        Raises:
            ValueError, TypeError: bad input, before any work.
            FloatingPointError: NaN or inf in weights or activations, with the layer.
            MemoryError: it cannot fit on the device, whatever the workspace; before any work.
        """
        if continuation is not None:
            refuse_beside(target=target, contrast=contrast, targets=targets, position=position, end=end)
            settings, given = self.options.updated(options), (prompt, components, continuation)
            return attribute_continuation(self.adapter, self.tokenizer, settings, *given, reduce=reduce, method=method)
        if reduce is not None:
            raise ValueError(f"reduce: {reduce!r} is of the tokens of a continuation; give continuation=, too.")
        request = self._request(prompt, components, end, options)
        request = with_targets(request, target, contrast=contrast, targets=targets, position=position)
        doubt_first_words(request)
        results = attributions(with_method(request, method))
        if not is_list_of_positions(position):
            results = [result for (result,) in results]
        return results if request.batch else results[0]

    @torch.no_grad()
    def attribute_generation(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        generation: dict[str, Any] | None = None,
        **options: Unpack[OptionValues],
    ) -> Generation:
        """Generate, then decompose the whole sequence once: the shares of all earlier tokens in every new one's logit.

        Args:
            prompt: text, ids or chat messages; one.
            max_new_tokens, generation: how to generate; ``generation`` holds further arguments of ``model.generate``,
                as ``{"do_sample": True}`` or ``{"max_length": 50}``. Default: greedy, and 20 tokens where no length is
                given.
            options: overrides of :class:`depass_fast.Options`.

        Raises:
            ValueError, TypeError: as :meth:`attribute`; more tokens than the model's context; nothing was generated.
        """
        arguments = generation_arguments(max_new_tokens, generation)
        settings = self.options.updated(options)
        return continuations.attribute_generation(self.adapter, self.tokenizer, settings, prompt, arguments)

    @torch.no_grad()
    def ledger(
        self,
        prompt: Prompt | Sequence[Prompt] | Trace,
        target: Any = None,
        *,
        rule: LinearRuleName | None = None,
        contrast: int | str | None = None,
        targets: Sequence[Any] | None = None,
        position: int | Sequence[int] = -1,
        attention: bool = False,
        **options: Unpack[OptionValues],
    ) -> Ledger:
        """Return every component's exact score under a linear rule, by one forward and one backward pass.

        ``rule`` is "shapley", "half" or "taylor" (docs/rules.md says which for what). None: the engine's ``allocation``
        where that is one of them, else "shapley". With ``attention`` the ledger has a second book, ``steered``: what
        the target owes to where heads looked (:meth:`attention_credit`), for all components of all layers by the same
        backward pass. The other arguments are those of :meth:`attribute`, and so are the errors; ``attention`` also
        raises ValueError for a family whose queries and keys cannot be made again.
        """
        refuse_arguments(options)
        if attention:
            self.adapter.check_uniform("model: attention's own book")
        settings = self.options.updated(options)
        check_options(settings)
        given: OptionValues = {**options, "allocation": rule_of(rule, settings), "shard": None}  # it carries no states
        request = self._request(prompt, Tokens(), None, given)
        request = with_targets(request, target, contrast=contrast, targets=targets, position=position)
        return Ledger.of(with_method(request, "adjoint"), not is_list_of_positions(position), attention)

    @torch.no_grad()
    def load_ledger(self, path: str | Path) -> Ledger:
        """Read a file of :meth:`depass_fast.Ledger.save`. One forward pass makes its trace anew, on this device.

        Raises:
            ValueError: the file holds no ledger, or one of a model with other weights; the message says what differs.
        """
        return Ledger.read(path, self.adapter, self.tokenizer, replace(self.options, shard=None))

    def _request(
        self,
        prompt: Prompt | Sequence[Prompt] | Trace,
        components: ComponentKind,
        end: int | str | None,
        options: OptionValues,
    ) -> Request:
        settings = self.options.updated(options)
        return make_request(self.adapter, self.tokenizer, settings, prompt, components, end)
