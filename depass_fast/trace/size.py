"""The size of a trace, computed from a model's config alone.

The shapes of what :mod:`depass_fast.trace.capture` records are read from a model without weights, on torch's meta
device. Everything is recorded once per position, so that the size is a number of bytes per position.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..adapters import Adapter, Attention, Latent, Mlp, Recurrence, adapt

_INDEX = 8  # bytes of an id or a position
_known: WeakKeyDictionary = WeakKeyDictionary()


def trace_nbytes(config: Any, lengths: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes of a trace of prompts of ``lengths`` tokens: its :attr:`depass_fast.Trace.nbytes`.

    Args:
        config: transformers' config of a model of a supported family. No weights are loaded.
        lengths: tokens of every prompt; any number of prompts.
        dtype: the dtype of the model's weights, in which most is recorded.

    The number is exact, unless the family clamps its values (OLMo, MPT with ``clip_qkv``). Then it is an upper bound,
    reached as soon as one value in every layer is clamped. It is one, too, where choices of a router may stand for an
    expert that gives back what it reads (LongCat). Any other mixture of experts records the same number of rows per
    position and layer, whichever experts they go to.

    Raises:
        ValueError: the family is not supported.
    """
    adapter, each = _measured(_Key(config), dtype)
    return sum(lengths) * (each + selection_bytes(adapter, max(lengths)))


class _Key:
    """A config that is hashed and compared by its contents."""

    def __init__(self, config: Any) -> None:
        self.config, self.text = config, f"{type(config)} {config.to_json_string(use_diff=False)}"

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@functools.lru_cache(maxsize=16)
def _measured(key: _Key, dtype: torch.dtype) -> tuple[Adapter, int]:
    adapter = without_weights(key.config)
    return adapter, bytes_per_position(adapter, dtype)


def bytes_per_position(adapter: Adapter, dtype: torch.dtype) -> int:
    """The bytes of a trace per position, for a model of ``dtype``, beside those of selected keys."""
    width, end = adapter.hidden_size, dtype.itemsize
    if getattr(adapter.config, "residual_in_fp32", False):  # Mamba's layers read the stream in the weights' dtype
        end = torch.promote_types(dtype, torch.float32).itemsize
    stream = 1 if adapter.final_norm_module is None else 2  # after the last layer, and after the final norm
    layers = sum(layer_bytes(adapter, dtype))
    if adapter.family.streams is not None:  # all of them, and their weights in what the final norm reads
        stream += adapter.family.streams.count
        narrow, wide = adapter.family.streams.end_numbers()
        layers += narrow * end + wide * torch.promote_types(dtype, torch.float32).itemsize
    return _INDEX + stream * width * end + layers


def selection_bytes(adapter: Adapter, longest: int) -> int:
    """The bytes per position of the keys that indexers select, for prompts of up to ``longest`` tokens."""
    if adapter.selects is None:
        return 0
    numbers = 0
    for index in filter(adapter.has_indexer, range(adapter.n_layers)):
        keyed, block = adapter.kind(index).keyed, adapter.kind(index).key_block
        if longest // ((None if keyed is None else keyed.rate) or 1) <= adapter.selects:  # every key is selected
            continue
        numbers += adapter.selects if block is None else adapter.selects // block * adapter.attention(index).n_kv_heads
    return numbers * torch.int32.itemsize


def without_weights(config: Any) -> Adapter:
    """The adapter of a model on the meta device, with shapes alone. Raises ValueError as :func:`trace_nbytes`."""
    home = _home(type(config))
    if home is None:
        raise ValueError(f"config: {type(config).__name__} is not the config of a causal language model.")
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # every model has it, and every machine can run it
    with torch.device("meta"):
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[home]
        return adapt(model_class(config))


def _home(config: type) -> type | None:
    """The class of config by which transformers finds the causal language model of a class of config, or None.

    It is the class itself, an ancestor (of a fork), or one that it is a part of (Emu 3's text model).
    """
    home = next((base for base in config.__mro__ if base in MODEL_FOR_CAUSAL_LM_MAPPING), None)
    if home is not None:
        return home
    parts: dict[Any, Any] = {one: one.sub_configs for one in MODEL_FOR_CAUSAL_LM_MAPPING}
    return next((one for one, its in parts.items() if config in its.values()), None)


def layer_bytes(adapter: Adapter, dtype: torch.dtype) -> list[int]:
    """The bytes per position of every layer, looked up once per model."""
    known: dict[torch.dtype, list[int]] = _known.setdefault(adapter.model, {})
    if dtype not in known:
        known[dtype] = [_layer(adapter, index, dtype) for index in range(adapter.n_layers)]
    return known[dtype]


def _layer(adapter: Adapter, index: int, dtype: torch.dtype) -> int:
    """The bytes per position of one layer: the fields of LayerTrace, AttentionTrace and MlpTrace."""
    layer, item, wide = adapter.layer(index), dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    attention, branches = layer.attention, [branch for branch in (layer.attention, *layer.mlps[:1]) if branch]
    copied = layer.attention is not None and bool(layer.mlps)  # the stream between two branches
    streams = 1 + copied + sum(branch.front is not None for branch in branches)
    streams += sum(branch.stream is not None and not branch.stream.is_factor for branch in branches)
    outputs = [branch.output for branch in branches if branch.output is not None and not branch.output.is_factor]
    scales = len(outputs) + sum(mlp.inner is not None for mlp in layer.mlps)
    size = streams * adapter.hidden_size * item + scales * wide
    size += 0 if adapter.kind(index).mlp_scale is None else adapter.hidden_size * wide
    size += _mlps(layer.mlps, adapter.experts_per_position, adapter.weighs_inputs, item)
    size += _beside(layer.mlps, adapter.hidden_size, item, wide)
    size += _streams(adapter, index, attention, item, wide)
    if attention is None:
        return size
    if attention.scales_heads:
        size += attention.o.shape[1] * (wide if attention.is_recurrent else item)
    if attention.is_recurrent:
        return size + _recurrence(adapter, index, attention, item, wide)
    if attention.is_keyed:
        return size + _keyed(adapter, index, attention, item, wide)
    own = attention.source is None  # else the keys, and the scales of values, are another layer's
    size += (attention.n_heads + own * attention.n_kv_heads) * attention.key_dim * item
    size += wide if isinstance(attention.v, Latent) else 0
    sinks = adapter.has_sinks and getattr(adapter.module(index, "attention"), "sinks", True) is not None
    routed = adapter.kind(index).head_experts is not None
    size += attention.n_heads * wide * (adapter.has_alibi + sinks + routed)
    size += 0 if attention.value_limit is None else attention.v.shape[0] * item
    size += 0 if attention.value_norm is None else own * attention.n_kv_heads * wide
    behind = attention.scales_heads or attention.value_norm is not None
    has_constant = behind and (attention.v.has_bias or _has_beta(attention))
    return size + (attention.o.shape[1] * wide if has_constant else 0)


def _streams(adapter: Adapter, index: int, attention: Attention, item: int, wide: int) -> int:
    """The bytes of several residual streams beside what branches read of them, of their frozen maps, and of embeddings.

    The embeddings are those that the next layer adds to the streams.
    """
    streams = adapter.kind(index).streams
    if streams is None:
        return 0
    shared = attention.source is not None  # what its values read is another layer's
    more = 0 if shared else attention.v.shape[1] // adapter.hidden_size - 1  # of several streams side by side
    held = streams.count + (streams.middle if adapter.has_mlp(index) else 0) + more - shared
    narrow, of_scales = streams.numbers()
    held += 0 if adapter.embeddings_of(index + 1) is None else streams.count
    return held * adapter.hidden_size * item + narrow * item + of_scales * wide


def _has_beta(attention: Attention) -> bool:
    norm = attention.norm if attention.front is None else attention.front.norm
    return norm is not None and norm.bias is not None


def recurrence_of(adapter: Adapter, index: int) -> tuple[Recurrence, Any]:
    """Return the recurrence of layer ``index`` at one position, for its shapes, and what makes outputs of its parts."""
    mixer, module, attention = adapter.kind(index).mixer, adapter.module(index, "attention"), adapter.attention(index)
    assert mixer is not None

    def outputs_of(what: Any) -> list[torch.Tensor]:
        weights: Any = [module.get_submodule(name).weight for name in what.projections]
        return [one.new_zeros(1, len(one)) for one in weights]

    outputs = outputs_of(mixer)
    turn = (outputs[0].new_zeros(1, 1, attention.key_dim),) * 2
    named: list[Any] = [{"position_embeddings": turn}] if mixer.attends else []
    with torch.no_grad():
        return mixer.read(module, outputs, lambda x, conv, part=None: x, *named), outputs_of


def _recurrence(adapter: Adapter, index: int, attention: Attention, item: int, wide: int) -> int:
    """The bytes per position of a recurrence: its numbers, and the ratios of its values."""
    mixer, module = adapter.kind(index).mixer, adapter.module(index, "attention")
    assert mixer is not None
    given, outputs_of = recurrence_of(adapter, index)
    recorded = (given.decay, given.write, given.log_write, given.own, given.log_own, given.in_ratio, given.relative)
    numbers = sum(x.shape[1:].numel() for x in recorded if x is not None)
    looked_at = given.q.shape[1:].numel() + given.k.shape[1:].numel()
    numbers += attention.v.shape[0] if mixer.value_ratio is not None else 0
    biased = attention.v.has_bias or _has_beta(attention) or (attention.conv is not None and attention.conv.has_bias)
    behind = adapter.kind(index).head_scale
    constant = None if behind is None or behind.constant is None else behind.constant(module, outputs_of(behind))
    numbers += 0 if constant is None else constant.shape[1]
    size = (numbers + (attention.o.shape[1] if biased else 0)) * wide + looked_at * (item if mixer.attends else wide)
    sides = adapter.sides(index)
    if sides is None:
        return size
    return size + (sides[0].n_heads + sides[0].n_kv_heads) * sides[0].key_dim * item


def _keyed(adapter: Adapter, index: int, attention: Attention, item: int, wide: int) -> int:
    """The bytes per position of keys that are values: queries, keys, those of entries, angles, ratios of values."""
    keyed = adapter.kind(index).keyed
    assert keyed is not None
    each = attention.n_heads + 1 + (keyed.rate is not None)
    return (each * attention.key_dim + keyed.turned) * item + attention.v.shape[0] * wide


def _mlps(mlps: Sequence[Mlp], experts_per_position: int, weighs_input: bool, item: int) -> int:
    """The bytes per position of the MLP, or of the experts that a position goes to."""
    routed = [mlp for mlp in mlps if mlp.is_routed]
    everywhere = [mlp for mlp in mlps if not mlp.is_routed]
    size = sum(2 * mlp.gate.shape[0] * item + _router_weight(mlp, item) for mlp in everywhere)
    if routed:
        each = (
            _INDEX + 2 * routed[0].gate.shape[0] * item + _router_weight(routed[0], item) * (2 if weighs_input else 1)
        )
        size += experts_per_position * each
    return size


def _beside(mlps: Sequence[Mlp], width: int, item: int, wide: int) -> int:
    """The bytes of what a gate of the token's embedding reads and is multiplied by, and of norms of its own.

    Where experts stand beside an MLP, each of the two has scales of its own; one of them is counted with the branch.
    """
    gates = [mlp for mlp in mlps if mlp.follows]
    several = len({id(mlp.norm) for mlp in mlps if not mlp.follows}) > 1
    return sum(width * item + mlp.gate.shape[0] * item + wide for mlp in gates) + several * wide


def _router_weight(mlp: Mlp, item: int) -> int:
    """The bytes of a router's weight, which is recorded for an expert, the shared one too."""
    return item if mlp.name and not mlp.follows else 0
