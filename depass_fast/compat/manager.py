"""The published manager's class. Its calls become decompositions, its deviations initial states and rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters import adapt, unwrap, without_biases
from ..adapters.stored import stored_bias, stored_weight
from ..components.arrays import as_tensor
from ..components.base import ComponentKind, LayerKind
from ..components.custom import Custom
from ..components.model import Heads, Modules, Neurons, Tokens
from ..inputs.generation import generate
from ..inputs.loading import as_tokenizer, check_weights
from ..inputs.prompts import Prompt, encode
from ..labels import BIAS, REST
from ..methods.states import carry
from ..options import Options
from ..propagation.loop import propagate
from ..request import fit, make_request, start, take_trace, traced
from ..state.layout import Components, Layout
from ..state.state import ComponentState
from .ahead import LayersAhead
from .kept import KeptTrace, fingerprint
from .rules import RULES, PublishedRule
from .steps import CHANGED, PublishedSteps

_MODULES: dict[str, Literal["attention", "mlp"]] = {"attn": "attention", "mlp": "mlp"}


class decomposed_state_manager(PublishedSteps):
    """The published interface, see :mod:`depass_fast.compat`.

    Component states are returned on the CPU, in the model's dtype, positions first: (N, M, D). ``states`` is the
    residual stream of the last forward pass, before and after every attention and, last, before the final norm: 2 L + 1
    tensors (1, N, D) where the layers are. A call on the prompt of the call before reads that one's forward pass, as
    long as weights, hooks and settings are the same (:mod:`.kept`); :meth:`get_states` always takes a new one. Of calls
    for one layer after the other, the second and later ones carry layers that follow along (:mod:`.ahead`).

    Args:
        model: a Hugging Face model of any family that depass_fast supports.
        tokenizer: needed for text prompts and for generation; ids (list or tensor) are accepted too.
        mlp_softmax_temp: T of the softmax rule.
        ignore_special_token: keep token 0 out of the other tokens' allocation.
        mlp_decomposed_function: "softmax", "linear", "relu", "max" or "taylor".
        corrected: the complete decomposition instead of the published one.
        options: others of :class:`depass_fast.Options`, as ``backend`` or ``memory_budget``.

    Raises:
        ValueError, TypeError: unknown rule or option, unsupported model; every call: bad prompts and layers, before any
            work.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        mlp_softmax_temp: float = 0.1,
        ignore_special_token: bool = True,
        mlp_decomposed_function: str = "softmax",
        *,
        corrected: bool = False,
        **options: Any,
    ) -> None:
        if mlp_decomposed_function not in RULES:
            raise ValueError(f"mlp_decomposed_function: {mlp_decomposed_function!r} is not one of {', '.join(RULES)}.")
        for name in ("allocation", "temperature", "exclude_special"):
            if name in options:
                raise TypeError(f"{name}: say it by the published arguments.")
        self.model, self.tokenizer = model, tokenizer
        self.mlp_softmax_temp = mlp_softmax_temp
        self.ignore_special_token = ignore_special_token
        self.mlp_decomposed_function = mlp_decomposed_function
        self.corrected = corrected
        inner, tokenizer = unwrap(model, tokenizer)
        self._inner_tokenizer = as_tokenizer(tokenizer)
        adapter = adapt(inner)
        adapter.check_uniform("model: the published interface", " Take depass_fast.DePass.")
        if adapter.head is not None:
            raise ValueError(
                "model: the published interface reads logits behind the final norm, and this model has a head there. "
                "Take depass_fast.DePass."
            )
        adapter.check_selects_nothing("model: the published interface")
        self._settings = Options(temperature=mlp_softmax_temp).updated(options)
        self._settings.build(adapter)
        check_weights(adapter)
        self._traced = adapter  # the forward pass keeps its biases, whatever the propagation does
        self._adapter = adapter if corrected else without_biases(adapter)
        attention = self._adapter.layer(0).attention
        self.num_layers, self.hidden_dim = self._adapter.n_layers, self._adapter.hidden_size
        self.num_heads, self.num_key_value_heads = attention.n_heads, attention.n_kv_heads
        self.head_dim = attention.head_dim
        self._kept = None
        self._ahead = LayersAhead(self._adapter)
        self.states: list[Tensor] = []

    # -- states -------------------------------------------------------------------------------------------------

    def get_states(self, prompt: Prompt) -> list[Tensor]:
        """The residual stream of one forward pass; also kept in ``states``, its length in ``attribute_len``."""
        return self._publish(self._encode(prompt))

    def _read(self, prompt: Prompt) -> list[Tensor]:
        """Return what :meth:`get_states` would, without a forward pass where that would be the same again."""
        return self._publish(self._encode(prompt), self._kept)

    def _encode(self, prompt: Prompt) -> Tensor:
        return encode(prompt, self._adapter, self._inner_tokenizer, self._settings.chat_template_kwargs)

    @torch.no_grad()
    def _publish(self, ids: Tensor, kept: KeptTrace | None = None) -> list[Tensor]:
        now = fingerprint(self._traced, ids)
        if kept is None or not kept.holds(now):
            self._kept = kept = None  # its memory, before that of the next one is needed
            self._ahead.clear()
            kept = KeptTrace(take_trace(self._traced, [ids], self._settings.progress), now)
        self._kept, trace = kept, kept.trace
        stream = [x for layer in trace.layers for x in (layer.resid_pre, layer.resid_mid)]
        self.states = [x[None].clone() for x in (*stream, trace.resid_final)]
        self.attribute_len = self.states[0].shape[1]
        return self.states

    # -- tokens -------------------------------------------------------------------------------------------------

    def get_last_layer_decomposed_state(
        self, prompt: Prompt, single_compute_token: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Carry the tokens of the embedding to the final norm. Returns (N, N, D), and the states."""
        return self.get_middle_to_last_decomposed_state(prompt, 0)

    def get_middle_to_last_decomposed_state(self, prompt: Prompt, start_layer_idx: int) -> tuple[Tensor, list[Tensor]]:
        """Carry the tokens that enter ``start_layer_idx`` to the final norm. Returns (N, N, D), and the states."""
        states = self._read(prompt)
        return self._finish(*self._start(Tokens(start_layer_idx))), states

    def compute_decomposed_state(self, start_layer_idx: int, single_compute_token: int | None = None) -> Tensor:
        """Carry the tokens of the prompt that :meth:`get_states` saw last. Returns (N, N, D)."""
        if self._kept is None:
            raise RuntimeError("compute_decomposed_state: call get_states(prompt) first.")
        if self._kept.fingerprint != fingerprint(self._traced, self._kept.trace.input_ids):
            raise ValueError(f"compute_decomposed_state: {CHANGED}")
        return self._finish(*self._start(Tokens(start_layer_idx)))

    def get_middel_to_middle_decomposed_state(
        self, prompt: Prompt, start_layer_idx: int, end_layer_idx: int, single_compute_token: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Carry the tokens that enter one layer to the input of another. Returns (N, N, D), and the states."""
        states = self._read(prompt)
        state, options = self._start(Tokens(start_layer_idx), end_layer_idx)
        state, _ = propagate(self._adapter, self._require_trace(), state, end_layer_idx, self._run(options))
        return self._returned(state), states

    def all_layer_to_init_attribute_state(
        self, prompt: Prompt, single_compute_token: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Keep the tokens at the embedding and after every layer. Returns (L + 1, N, N, D), and the states."""
        states = self._read(prompt)
        state, options = self._start(Tokens())
        layers = [self._returned(state)]
        layers += [self._returned(s) for s in self._layers(state, options)]
        return torch.stack(layers), states

    # -- modules, heads, neurons ----------------------------------------------------------------------------------

    def get_layer_module_decomposed_state(
        self,
        prompt: Prompt,
        start_layer_idx: int,
        single_compute_token: int | None = None,
        type: Literal["attn", "mlp", "attn_head"] | None = None,
    ) -> Tensor:
        """The remainder, then the output of a layer's attention, of its MLP, or of every head: (N, 1 + M, D)."""
        if type not in (*_MODULES, "attn_head"):
            raise ValueError("type must be 'attn' or 'mlp' or 'attn_head'")
        self._read(prompt)
        kind = Heads(start_layer_idx) if type == "attn_head" else Modules(start_layer_idx, _MODULES[type])
        return self._of_layer(kind)

    def get_mlp_neuron_decomposed_state(
        self, prompt: Prompt, start_layer_idx: int, compute_num: int | None = None
    ) -> Tensor:
        """The remainder, then every neuron of ``start_layer_idx``: (N, 1 + I, D)."""
        self._read(prompt)
        return self._of_layer(Neurons(start_layer_idx))

    # -- subspaces ------------------------------------------------------------------------------------------------

    def get_subspace_decomposed_state(self, prompt: Prompt, start_layer_idx: int, attribute_state: Tensor) -> Tensor:
        """Carry given states (M, N, D) from the end of ``start_layer_idx`` to the final norm. Returns (N, M, D).

        ``start_layer_idx`` -1 is before the first layer. The dtype is the given one, or the model's where that is
        wider. With ``corrected`` what the states lack comes before them, and `bias`, where there is one, after them.
        """
        self._read(prompt)
        attribute_state = as_tensor(attribute_state, "attribute_state")
        dtype = torch.promote_types(attribute_state.dtype, self._adapter.dtype)
        return self._finish(*self._given(start_layer_idx, attribute_state), self.corrected, dtype)

    def get_subspace_decomposed_state_all_layer(
        self, prompt: Prompt, start_layer_idx: int, attribute_state: Tensor
    ) -> list[Tensor]:
        """Carry given states (M, N, D) and keep them after every later layer. Returns a list of (N, M, D).

        ``start_layer_idx`` -1 is before the first layer, so that there are L of them. The dtype is the given one.
        """
        self._read(prompt)
        attribute_state = as_tensor(attribute_state, "attribute_state")
        state, options = self._given(start_layer_idx, attribute_state)
        return [self._returned(s, self.corrected, attribute_state.dtype) for s in self._layers(state, options)]

    # -- readout and generation -------------------------------------------------------------------------------------

    @torch.no_grad()
    def compute_attribute_score(
        self, attribute_state: Tensor, token_idx: int, decode_token_id: int | Tensor | list[int]
    ) -> Tensor:
        """Return every component's share in a token's logit, in float32: (M,), or (M, K) for K tokens."""
        head = self._adapter.unembedding
        weight, bias = stored_weight(head), stored_bias(head)
        scores = nn.functional.linear(attribute_state[token_idx].to(weight), weight[decode_token_id])
        if bias is not None and self.corrected:
            scores[-1] += bias[decode_token_id]  # `bias` is the last component
        elif bias is not None:
            scores += bias[decode_token_id]
        return scores.float()

    @torch.no_grad()
    def model_generate_cite(
        self,
        prompt: Prompt,
        inputs: Tensor | None = None,
        max_length: int | None = None,
        min_length: int | None = None,
        do_sample: bool | None = None,
        num_beams: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        bad_words_ids: list[list[int]] | None = None,
        force_words_ids: list | None = None,
        bos_token_id: int | None = None,
        pad_token_id: int | None = None,
        eos_token_id: int | None = None,
        length_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        encoder_no_repeat_ngram_size: int | None = None,
        num_return_sequences: int | None = None,
        **generation: Any,
    ) -> tuple[str, list[dict[str, Any]], Tensor, list[Tensor]]:
        """Generate, then decompose the whole sequence once.

        Arguments are those of ``model.generate`` (and more of them, as ``max_new_tokens``); ``inputs`` is ignored, as
        published.

        Returns:
            the text; per generated token a dict of ``token`` and ``attribute_score`` (N,), the shares of all N tokens
            in its logit (those from itself on are zero); the state (N, N, D); the states of :meth:`get_states`.
        """
        arguments = {k: v for k, v in locals().items() if k not in ("self", "prompt", "inputs", "generation")}
        arguments = {k: v for k, v in arguments.items() if v is not None} | generation
        if self.tokenizer is None:
            raise ValueError("model_generate_cite: a tokenizer is needed for the text that it returns.")
        ids = encode(prompt, self._adapter, self._inner_tokenizer, self._settings.chat_template_kwargs)
        ids, length = generate(self._adapter, ids, self._settings.progress, **arguments)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        attribute_state, states = self.get_last_layer_decomposed_state(ids)
        scores = [
            {
                "token": self.tokenizer.decode(ids[i]),
                "attribute_score": self.compute_attribute_score(attribute_state, i - 1, int(ids[i])),
            }
            for i in range(length, len(ids))
        ]
        return text, scores, attribute_state, states

    # -- how ------------------------------------------------------------------------------------------------------

    def _options(self, tokens: bool) -> dict[str, Any]:
        rule, ignore = self.mlp_decomposed_function, self.ignore_special_token
        # what differs from the method is the rule itself, or component 0's gate; tokens are alone at position 0
        as_published = rule in ("linear", "relu") or (not tokens and rule in ("softmax", "max"))
        if as_published and not self.corrected:
            rule = PublishedRule(rule, tokens, tokens and ignore)
        return {"allocation": rule, "temperature": self.mlp_softmax_temp, "exclude_special": ignore}

    @torch.no_grad()
    def _start(
        self, kind: ComponentKind, end: int | None = None, **changes: Any
    ) -> tuple[ComponentState, dict[str, Any]]:
        """Return the initial state of ``kind`` on the last prompt, and the options to carry it with."""
        options = self._options(isinstance(kind, Tokens)) | changes
        trace, settings = self._require_trace(), self._settings.updated(options)
        state = start(traced(fit(make_request(self._adapter, self._inner_tokenizer, settings, trace, kind, end))))
        if not self.corrected and isinstance(kind, (Heads, Neurons)):
            layer = kind.resolve(self._adapter)
            record = trace.layers[layer]
            rest = torch.from_numpy(state.layout.extra_rows(REST)).to(state.device)
            if isinstance(kind, Heads):
                state.rows[rest] = record.resid_pre.to(state.rows)
            else:
                state.rows[rest] -= (trace.resid(layer + 1) - record.resid_mid).to(state.rows)
        return state, options

    def _given(self, layer: int, attribute_state: Tensor) -> tuple[ComponentState, dict[str, Any]]:
        """Return a state of the user's, complete or not, as a component state; `rest` completes it if corrected."""
        if layer < -1:
            raise ValueError(
                f"start_layer_idx: {layer} is out of range; subspaces start after layer 0 to {self.num_layers - 1}, "
                "or, with -1, before layer 0."
            )
        states = attribute_state.detach().transpose(0, 1).contiguous()
        kind = Custom(0, states) if layer == -1 else Custom(layer, states, site="resid_post")
        state, options = self._start(kind, state_dtype=self._carried_dtype(states.dtype))
        if not self.corrected:
            names = tuple(f"component {m}" for m in range(1, states.shape[1]))
            layout = Layout.of((Components.everywhere(names, (REST,)),), self._require_trace().offsets)
            state = ComponentState(states.flatten(0, 1).to(state.rows, copy=True), layout, state.layer)
        return state, options

    def _layers(self, state: ComponentState, options: dict[str, Any]) -> Iterator[ComponentState]:
        """Yield the state after every layer that is still ahead."""
        run = self._run(options)
        for layer in range(state.layer, self.num_layers):
            state, _ = propagate(self._adapter, self._require_trace(), state, layer + 1, run)
            yield state

    def _of_layer(self, kind: LayerKind) -> Tensor:
        """Carry components of a layer through all layers that are ahead, and the final norm."""
        assert self._kept is not None, "get_states was called"
        if self._kept.fingerprint is None:  # nobody can tell if the next call is of the same weights
            return self._finish(*self._start(kind))
        asked = self.mlp_decomposed_function, self.mlp_softmax_temp, self.ignore_special_token, self.corrected
        run = self._run(self._options(tokens=False))
        state = self._ahead.carry(kind, self._kept.trace, run, asked, lambda one: self._start(one)[0])
        return self._returned(state)

    def _finish(
        self, state: ComponentState, options: dict[str, Any], rest: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Carry a state through all layers that are ahead, and the final norm."""
        state = carry(self._adapter, self._require_trace(), state, None, self._run(options))
        return self._returned(state, rest, dtype)

    def _returned(self, state: ComponentState, rest: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """Return the state of the prompt (N, M, D) in the published order: `rest`, the components, then `bias`.

        With ``rest`` what is left is there even if it is nothing. ``dtype`` None is the model's.
        """
        block, components = state.block(0), state.layout.components[0]
        order = list(range(len(components.extras), len(components)))
        order[:0] = [i for i, extra in enumerate(components.extras) if extra == REST]
        order += [i for i, extra in enumerate(components.extras) if extra == BIAS]
        if order != list(range(len(components))):
            block = block[:, order]
        if rest and REST not in components.extras:
            block = torch.cat([torch.zeros_like(block[:, :1]), block], dim=1)
        return block.to("cpu", dtype or self._adapter.dtype)
