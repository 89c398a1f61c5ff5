"""The single steps of the published manager, and what it keeps of a forward pass, for scripts with a loop of their own.

They act as published, whatever ``corrected`` says. What is frozen is that of the forward pass that was read last: a
step refuses a state, a mask or weights that are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter, without_biases
from ..components.model import Heads
from ..components.start import initial_state
from ..options import Options
from ..propagation.layer import through_attention, through_mlp
from ..propagation.run import Run
from ..runtime.precision import full_precision
from ..state.layout import Components, Layout
from ..state.state import ComponentState
from ..trace.attention import causal_mask
from ..trace.record import AttentionTrace, LayerTrace, Trace
from . import utils
from .kept import KeptTrace
from .rules import PublishedRule

CHANGED = "the model has changed since get_states (weights, hooks or settings); call get_states(prompt) again."


class PublishedSteps:
    """The part of :class:`depass_fast.compat.decomposed_state_manager` that goes step by step.

    Component states are (M, N, D) here, on any device, and changed in place. ``state`` is what ``get_states``
    returned for the step: ``states[2 * layer]`` for attention, ``states[2 * layer + 1]`` for the MLP. ``masks``,
    ``dropouts`` and ``causals`` are the attributes of these names.

    Raises:
        RuntimeError: no forward pass was taken yet.
        ValueError: anything but what that forward pass had; a layer whose MLP does not follow its attention, or is a
            mixture of experts.
    """

    model: nn.Module
    num_layers: int
    mlp_decomposed_function: str
    states: list[Tensor]
    _adapter: Adapter
    _settings: Options
    _kept: KeptTrace | None

    attention_weight_compute = staticmethod(utils.compute_attention_weights_mha)

    @property
    def model_name(self) -> str:
        """The published name of the family: "qwen", or "llama" for any other."""
        return "qwen" if "qwen" in self._adapter.config.model_type.lower() else "llama"

    @property
    def apply_rotary_pos_emb(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The published rotary embedding of the family."""
        return getattr(utils, f"apply_rotary_pos_emb_{self.model_name}")

    @property
    def masks(self) -> list[Tensor | None]:
        """The mask of every layer's attention: None where it is causal alone, else (1, 1, N, N) or (1, H, N, N)."""
        return [_mask(record.attention) for record in self._read_trace("masks").layers]

    @property
    def causals(self) -> list[bool]:
        """True for every layer that needs a causal mask beside :attr:`masks`."""
        return [mask is None and len(self.states[0][0]) > 1 for mask in self.masks]

    @property
    def dropouts(self) -> list[float]:
        """0.0 for every layer."""
        return [0.0 for _ in self._read_trace("dropouts").layers]

    @property
    def mlp_decomposed_compute(self) -> Callable[..., Tensor]:
        """The step through an MLP under ``mlp_decomposed_function``."""
        return getattr(self, f"mlp_decomposed_compute_{self.mlp_decomposed_function}")

    @torch.no_grad()
    @full_precision()
    def attn_decomposed_compute(
        self,
        layer_idx: int,
        state: Tensor,
        masks: list[Tensor | None],
        dropouts: list[float],
        causals: list[bool],
        attribute_state: Tensor,
    ) -> Tensor:
        """Carry a state (M, N, D) through the attention of a layer, in place, and return it."""
        record = self._attention_record(layer_idx, state, masks, dropouts, causals)
        adapter, run = self._begin(layer_idx, attribute_state, {})
        carried = _as_state(attribute_state, self._read_trace("attention"), layer_idx, "resid_pre", run)
        carried, _ = through_attention(carried, adapter.layer(layer_idx), record, run)
        return _written(attribute_state, carried)

    def mlp_decomposed_compute_softmax(self, *args: Any, **kwargs: Any) -> Tensor:
        """Carry a state through the MLP of a layer under this rule. Arguments as of :meth:`_through_mlp`."""
        return self._through_mlp("softmax", *args, **kwargs)

    def mlp_decomposed_compute_linear(self, *args: Any, **kwargs: Any) -> Tensor:
        """Carry a state through the MLP of a layer under this rule. Arguments as of :meth:`_through_mlp`."""
        return self._through_mlp("linear", *args, **kwargs)

    def mlp_decomposed_compute_relu(self, *args: Any, **kwargs: Any) -> Tensor:
        """Carry a state through the MLP of a layer under this rule. Arguments as of :meth:`_through_mlp`."""
        return self._through_mlp("relu", *args, **kwargs)

    def mlp_decomposed_compute_max(self, *args: Any, **kwargs: Any) -> Tensor:
        """Carry a state through the MLP of a layer under this rule. Arguments as of :meth:`_through_mlp`."""
        return self._through_mlp("max", *args, **kwargs)

    def mlp_decomposed_compute_taylor(self, *args: Any, **kwargs: Any) -> Tensor:
        """Carry a state through the MLP of a layer under this rule. Arguments as of :meth:`_through_mlp`."""
        return self._through_mlp("taylor", *args, **kwargs)

    @torch.no_grad()
    @full_precision()
    def _through_mlp(
        self,
        rule: str,
        layer_idx: int,
        state: Tensor,
        attribute_state: Tensor,
        mlp_softmax_temp: float = 0.1,
        ignore_special_token: bool = True,
        cur_num: int | None = None,
    ) -> Tensor:
        """Carry a state (M, N, D) through the MLP of a layer, in place, and return it.

        ``ignore_special_token`` keeps component 0 out, but for position 0. The last component is what the others lack.
        ``cur_num`` is accepted and changes nothing.
        """
        record = self._record(layer_idx, state, "resid_mid")
        allocation = rule if rule == "taylor" else PublishedRule(rule, ignore_special=ignore_special_token)
        options = {"allocation": allocation, "temperature": mlp_softmax_temp}
        adapter, run = self._begin(layer_idx, attribute_state, options)
        carried = _as_state(attribute_state, self._read_trace("mlp"), layer_idx, "resid_mid", run)
        return _written(attribute_state, through_mlp(carried, None, adapter.layer(layer_idx), record, run))

    @torch.no_grad()
    def attn_head_contribution_compute(
        self,
        layer_idx: int,
        state: Tensor,
        masks: list[Tensor | None],
        dropouts: list[float],
        causals: list[bool],
        attribute_state: Tensor,
    ) -> Tensor:
        """Return the output of every head of a layer, (H, N, D), where ``attribute_state`` is."""
        self._attention_record(layer_idx, state, masks, dropouts, causals)
        adapter, trace = without_biases(self._adapter), self._read_trace("heads")
        heads = initial_state(Heads(layer_idx), adapter, trace, has_bias=False, dtype=torch.float32).block(0)[:, 1:]
        return heads.transpose(0, 1).to(attribute_state.device, self._adapter.dtype)

    def get_per_ffn2_values(self, state: Tensor, layer_idx: int) -> Tensor:
        """Return what the down projection of a layer reads, given what its MLP reads: (..., N, D) -> (..., N, I)."""
        self._check_layer(layer_idx)
        found: list[Tensor] = []
        down = self._adapter.module(layer_idx, "down_proj")
        hook = down.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        try:
            self._adapter.module(layer_idx, "mlp")(state)
        finally:
            hook.remove()
        return found[0]

    # -- how ------------------------------------------------------------------------------------------------------

    def _read_trace(self, name: str) -> Trace:
        if self._kept is None:
            raise RuntimeError(f"{name}: call get_states(prompt) first.")
        return self._kept.trace

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer_idx: {layer} is out of range; allowed are 0 to {self.num_layers - 1}.")
        if self._adapter.is_parallel or self._adapter.is_mixture(layer):
            raise ValueError(
                "layer_idx: single steps are for layers with one MLP, which follows the attention; call a method that "
                "carries states to the end instead."
            )

    def _record(self, layer: int, state: Tensor, site: str) -> LayerTrace:
        """Return the record of a layer, if ``state`` and the weights are those that it was made with."""
        self._check_layer(layer)
        record = self._read_trace("state").layers[layer]
        expected = getattr(record, site)
        if state.shape[-2:] != expected.shape or not torch.equal(state.reshape(expected.shape).to(expected), expected):
            place = 2 * layer + (site == "resid_mid")
            raise ValueError(
                f"state: it is not that of the last forward pass at this step; call get_states(prompt), and give "
                f"states[{place}]."
            )
        assert self._kept is not None, "there is a trace"
        known = self._kept.fingerprint
        self._kept.trace.source.check(self._adapter.model)
        if known is not None and not known.has(self._adapter.block(layer)):
            raise ValueError(f"layer_idx: {CHANGED}")
        return record

    def _attention_record(
        self, layer: int, state: Tensor, masks: list[Tensor | None], dropouts: list[float], causals: list[bool]
    ) -> LayerTrace:
        """Return the record of a layer, if ``state`` and the masks are those that it was made with."""
        record = self._record(layer, state, "resid_pre")
        mask, expected = masks[layer], _mask(record.attention)
        same = mask is expected or (mask is not None and expected is not None and torch.equal(mask, expected))
        if not same or dropouts[layer] != 0 or (mask is None and not causals[layer] and len(record.resid_pre) > 1):
            raise ValueError(
                "masks, dropouts, causals: they are not those of the last forward pass, which is frozen; give the "
                "attributes of these names. To mask attention, change the model or the prompt."
            )
        return record

    def _begin(self, layer: int, states: Tensor, options: dict[str, Any]) -> tuple[Adapter, Run]:
        """Return the model without its constants, and the run for one step of ``states`` (M, N, D)."""
        adapter = without_biases(self._adapter)
        run = self._run({"state_dtype": self._carried_dtype(states.dtype), **options})
        run.backend.begin(adapter, self._read_trace("state"), layer, layer + 1)
        return adapter, run

    def _run(self, options: dict[str, Any]) -> Run:
        return self._settings.updated(options).build(self._adapter)

    def _require_trace(self) -> Trace:
        assert self._kept is not None, "get_states was called"
        return self._kept.trace

    def _carried_dtype(self, given: torch.dtype) -> torch.dtype | str:
        """Return the dtype in which to carry states of a dtype: no narrower than theirs, unless an option says so."""
        usual = self._settings.dtypes(self._adapter.dtype, self._adapter.device)[0]
        return self._settings.state_dtype or torch.promote_types(usual, given)


def _mask(attention: AttentionTrace) -> Tensor | None:
    """Return the mask that one layer's attention had beside the causal one, with it; None if it had none."""
    count, window, bias = len(attention.q), attention.window, attention.key_bias
    if bias is None and (window is None or window >= count):
        return None
    places = torch.arange(count, device=attention.q.device)
    seen = causal_mask(places, count, window, attention.chunked)
    if bias is None:
        return seen[None, None]
    return bias.T[None, :, None].masked_fill(~seen, -torch.inf)


def _as_state(states: Tensor, trace: Trace, layer: int, site: str, run: Run) -> ComponentState:
    """Return dense states (M, N, D) as a component state before a step."""
    names = tuple(f"component {m}" for m in range(len(states)))
    layout = Layout.of((Components.everywhere(names, ()),), trace.offsets)
    rows = states.detach().transpose(0, 1).flatten(0, 1).to(trace.layers[layer].resid_pre.device, run.state_dtype)
    return ComponentState(rows.clone(), layout, layer, site)


def _written(states: Tensor, carried: ComponentState) -> Tensor:
    """Write a carried state into ``states`` (M, N, D), and return it."""
    return states.copy_(carried.block(0).transpose(0, 1))
