"""The calls of :class:`depass_fast.DePass` that explain attention itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from .calls import Calls
from .components.base import ComponentKind
from .components.model import Tokens
from .inputs.prompts import OnePrompt, Prompt, SeveralPrompts
from .ledger.given import rule_of
from .linear_rules import LINEAR_RULES
from .methods.credit import credits_of
from .methods.explain import attention_layer, check_start, explanations, heads_of, refuse_several
from .methods.head_weights import check_mixes, head_weights
from .options import CreditValues, LinearRuleName, LookValues, OptionValues
from .request import doubt_first_words, with_targets, with_trace
from .results.credit import AttentionCredit
from .results.explanation import AttentionExplanation
from .trace.record import Trace

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AttentionCalls(Calls):
    """Why heads look where they look, and what that is worth."""

    @overload
    def explain_attention(
        self,
        prompt: OnePrompt,
        components: ComponentKind,
        layer: int | str,
        head: int | Sequence[int] | None = None,
        **more: Unpack[LookValues],
    ) -> AttentionExplanation: ...

    @overload
    def explain_attention(
        self,
        prompt: SeveralPrompts,
        components: ComponentKind,
        layer: int | str,
        head: int | Sequence[int] | None = None,
        **more: Unpack[LookValues],
    ) -> list[AttentionExplanation]: ...

    @overload
    def explain_attention(
        self,
        prompt: Prompt | Sequence[Prompt] | Trace,
        components: ComponentKind,
        layer: int | str,
        head: int | Sequence[int] | None = None,
        **more: Unpack[LookValues],
    ) -> Any: ...

    @torch.no_grad()
    def explain_attention(
        self,
        prompt: Prompt | Sequence[Prompt] | Trace,
        components: ComponentKind,
        layer: int | str,
        head: int | Sequence[int] | None = None,
        *,
        query: int = -1,
        key: int | tuple[int, int] | None = None,
        **options: Unpack[OptionValues],
    ) -> Any:
        """Return the shares of components in the attention logits of one query (DESIGN.md section 9).

        The logit of a query and a key is c · Σ_m Σ_m' q_m · k_m', over the components m of the query's position and m'
        of the key's, as they are at the input of the layer; norms, rotary embedding and caps are frozen. Each side
        alone sums to the logit, and so do the pairs.

        Args:
            prompt: as for :meth:`depass_fast.DePass.attribute`.
            components: any kind, of one layer, that starts at the input of ``layer`` or before.
            layer: the attention's layer, -L to L - 1, or the name of its input's hook.
            head: a head, -H to H - 1, or a list of them; None: all of the layer.
            query: the position that looks, -N to N - 1.
            key: a position that it sees, or two of them (why one and not the other); None: all.
            options: overrides of :class:`depass_fast.Options`. ``allocation`` is the rule under which components come
                to the layer.

        Returns:
            An :class:`depass_fast.AttentionExplanation`; a list of them for several prompts, or the trace of several.

        Raises:
            ValueError, TypeError: bad input, before any work: a layer, head, query or key that is out of range, a key
                behind the query, components that start behind the layer or at several.
            ValueError: after the forward pass, a key that a window hides; queries and keys that cannot be made again
                from the residual stream (the message names the family).
            MemoryError: it cannot fit.
        """
        self._of_all(options, "explain_attention")
        self.adapter.check_uniform("model: attention's own book")
        number = attention_layer(layer, self.adapter)
        heads, one_head = heads_of(head, self.adapter, number)
        check_start(components, self.adapter, number)
        request = doubt_first_words(self._request(prompt, components, number, options))
        found = explanations(request, number, heads, one_head, query, key)
        return found if request.batch else found[0]

    @overload
    def head_weights(self, prompt: OnePrompt, layer: int | str, head: int | Sequence[int] | None = None) -> Tensor: ...

    @overload
    def head_weights(
        self, prompt: SeveralPrompts, layer: int | str, head: int | Sequence[int] | None = None
    ) -> list[Tensor]: ...

    @overload
    def head_weights(
        self,
        prompt: Prompt | Sequence[Prompt] | Trace,
        layer: int | str,
        head: int | Sequence[int] | None = None,
    ) -> Any: ...

    @torch.no_grad()
    def head_weights(
        self,
        prompt: Prompt | Sequence[Prompt] | Trace,
        layer: int | str,
        head: int | Sequence[int] | None = None,
    ) -> Any:
        """Return the weights W by which heads mix positions, frozen: a head gives Σ_k W[q, k] · v[k] at position q.

        With softmax attention W is P, the probabilities. Its rows sum to one; to less beside a sink (gpt-oss), to the
        router's weight where a router chooses heads (JetMoE). In differential attention (DiffLlama) it is P1 - λ P2.
        With a recurrence W is signed and lower triangular, and its rows do not sum to one (DESIGN.md section 10). Where
        a layer has both (Falcon-H1), the first heads are those of attention.

        W has nothing of what stands in front of it or behind it. v[k] is the output of the value projection, behind a
        norm or a clamp, and of a recurrence behind its gate, short convolution and activation. What a head gives passes
        a gate or a norm where the layer has one, then the output projection.

        Args:
            prompt: as for :meth:`depass_fast.DePass.attribute`.
            layer: the layer, -L to L - 1, or the name of its hook (``blocks.3.attn.hook_pattern``).
            head: a head, -H to H - 1, or a list of them; None: all of the layer. In Mamba-1 every channel is a head.

        Returns:
            A tensor (N, N) of queries and keys for one head, or (H', N, N), in float32, or in float64 if the model is,
            on the layer's device; a list of them for several prompts, or the trace of several.

        Raises:
            ValueError, TypeError: bad input, before any work: a layer or head that is out of range, a layer that does
                not mix positions, or whose values are keys (DeepSeek V4).
            MemoryError: it cannot fit.
        """
        number = attention_layer(layer, self.adapter)
        check_mixes(self.adapter, number)
        heads, one_head = heads_of(head, self.adapter, number)
        request = with_trace(self._request(prompt, Tokens(), None, {"shard": None}))
        trace = request.require_trace()
        found = [head_weights(self.adapter, trace, one, number, heads) for one in range(trace.n_prompts)]
        found = [weights[0] for weights in found] if one_head else found
        return found if request.batch else found[0]

    @overload
    def attention_credit(
        self, prompt: OnePrompt, components: ComponentKind, target: Any = None, **more: Unpack[CreditValues]
    ) -> AttentionCredit: ...

    @overload
    def attention_credit(
        self, prompt: SeveralPrompts, components: ComponentKind, target: Any = None, **more: Unpack[CreditValues]
    ) -> list[AttentionCredit]: ...

    @overload
    def attention_credit(
        self,
        prompt: Prompt | Sequence[Prompt] | Trace,
        components: ComponentKind,
        target: Any = None,
        **more: Unpack[CreditValues],
    ) -> Any: ...

    @torch.no_grad()
    def attention_credit(
        self,
        prompt: Prompt | Sequence[Prompt] | Trace,
        components: ComponentKind,
        target: Any = None,
        *,
        rule: LinearRuleName | None = None,
        contrast: int | str | None = None,
        targets: Sequence[Any] | None = None,
        position: int = -1,
        **options: Unpack[OptionValues],
    ) -> Any:
        """Return how much of a target's logit comes from attending *there* instead of evenly, for every component.

        A head that looked evenly at all that it sees would add something else to the target. The difference is shared
        out, for every head and all its queries, over the components of queries and keys (DESIGN.md section 9). Credit
        of neurons of all layers at once, summed over heads, is ``ledger(..., attention=True)``.

        Args:
            prompt, components, target, contrast, targets: as for :meth:`depass_fast.DePass.attribute`; components of
                one layer.
            rule: the linear rule of the way from heads to the target, "shapley", "half" or "taylor". None: the engine's
                ``allocation`` where that is one of them, else "shapley".
            position: where the target is read, -N to N - 1.
            options: overrides of :class:`depass_fast.Options`. ``allocation`` is the rule under which components come
                to the layers, by default ``rule``.

        Returns:
            An :class:`depass_fast.AttentionCredit`; a list of them for several prompts, or for the trace of several.

        Raises:
            ValueError, TypeError: bad input, before any work; components that reach no attention; a family whose
                queries and keys cannot be made again.
            MemoryError: it cannot fit.
        """
        settings = self._of_all(options, "attention_credit")
        self.adapter.check_uniform("model: attention's own book")
        if rule is not None and rule not in LINEAR_RULES:
            raise ValueError(
                f"rule: {rule!r} is not one of the linear rules {', '.join(map(repr, LINEAR_RULES))}, one of which the "
                "way from heads to the target needs. Components may come by any rule: allocation=."
            )
        refuse_several(components)
        chosen = rule_of(rule, settings)
        request = self._request(prompt, components, None, {"allocation": chosen, **options})
        request = with_targets(request, target, contrast=contrast, targets=targets, position=position)
        if any(len(reads) > 1 for reads in request.reads):
            raise ValueError("position: attention_credit reads one position; call it for each.")
        doubt_first_words(request)
        found = credits_of(request, chosen, replace(request.settings, allocation=chosen))
        return found if request.batch else found[0]
