"""The sizes that a plan is made of: widths of layers, numbers of components, the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch

from ..adapters import Adapter, Family, Layer
from ..allocation import Allocation
from ..backends.active import may_vanish
from ..backends.workload import LayerSize
from ..components.base import ComponentKind
from ..components.features import Features
from ..components.model import Heads, Modules, Neurons
from ..components.start import meets_bias
from ..options import Adjoint, Options
from ..trace.size import bytes_per_position, layer_bytes, selection_bytes
from .recurrences import mixer_sizes

_known: WeakKeyDictionary = WeakKeyDictionary()
_STREAMS, _LOGITS = 3, 3


@dataclass(frozen=True)
class RunShape:
    """Everything that the size of a run depends on: prompts of ``lengths`` tokens, carried to the input of ``end``.

    ``end`` None: after the final norm. ``traced``: the trace exists already, and is no part of the peak. ``counts`` are
    the named components of every prompt where they are known, or bounds of them. ``method`` None: exact. ``carried``:
    how many positions of every prompt are carried, up to the last one that is read; None: all. ``reads``: how many
    positions lie before every one that is read, itself included, per prompt, each of which takes an adjoint sweep of
    its own; None: the last one carried. ``gradients``: how many a way back carries, one for every target of every read
    of a prompt. ``is_ledger``: those of all sites are kept, and ``kind`` says nothing. ``ranks``: among so many the
    components are dealt; None: one process has all.
    """

    adapter: Adapter
    lengths: Sequence[int]
    kind: ComponentKind
    options: Options = field(default_factory=Options)
    end: int | None = None
    traced: bool = False
    counts: Sequence[int] | None = None
    method: Adjoint | None = None
    carried: Sequence[int] | None = None
    reads: Sequence[Sequence[int]] | None = None
    gradients: int = 1
    is_ledger: bool = False
    ranks: int | None = None

    @property
    def is_linear(self) -> bool:
        """True if the method is the way back of a linear rule."""
        return self.method is not None and Allocation(self.options.allocation).linear_rule is not None

    def with_lengths(self, lengths: Sequence[int]) -> RunShape:
        """Return the same for other prompts, each with as many components as the largest has."""
        counts = None if self.counts is None else [max(self.counts)] * len(lengths)
        carried = None if self.carried is None else [min(max(self.carried), n) for n in lengths]
        return replace(self, lengths=lengths, counts=counts, carried=carried, reads=None)

    @property
    def carried_lengths(self) -> Sequence[int]:
        """The number of positions of every prompt that are carried."""
        return self.lengths if self.carried is None else self.carried

    @property
    def sweeps(self) -> list[tuple[int, int]]:
        """The prompt and the number of positions of every adjoint sweep."""
        reads = [[n] for n in self.carried_lengths] if self.reads is None else self.reads
        return [(prompt, n) for prompt, lengths in enumerate(reads) for n in lengths]

    def with_state_dtype(self, dtype: torch.dtype) -> RunShape:
        return replace(self, options=replace(self.options, state_dtype=dtype))


def layer_sizes(adapter: Adapter) -> list[LayerSize]:
    """Return the size of every layer, looked up once per model."""
    if adapter.model not in _known:
        _known[adapter.model] = [_size(adapter, index) for index in range(adapter.n_layers)]
    return _known[adapter.model]


def _size(adapter: Adapter, index: int) -> LayerSize:
    layer = adapter.layer(index)
    attention, mlps = layer.attention, layer.mlps
    branches, mixer = [branch for branch in (attention, *mlps) if branch is not None], mixer_sizes(adapter)[index]
    routed = sum(mlp.is_routed for mlp in mlps)
    each = adapter.experts_per_position / max(1, routed + adapter.giving_back)
    shares = [each if mlp.is_routed else 1.0 for mlp in mlps]
    beside = False
    if mlps:
        up = f"{adapter.path(index, 'mlp')}.up_proj"  # what some ungated families call the only way in
        beside = hasattr(adapter.module(index, "mlp"), "up_proj") and adapter.path(index, "gate_proj") != up
        beside = beside or (not routed and layer.mlp.up is not None)  # under another name (LFM2)
    return LayerSize(
        v=0 if attention is None else attention.n_kv_heads * attention.head_dim,
        o=0 if attention is None else attention.n_heads * attention.head_dim,
        heads=0 if attention is None else attention.n_heads,
        mlps=tuple((mlp.gate.shape[0], share) for mlp, share in zip(mlps, shares, strict=True)),
        copied=layer.parallel
        or adapter.spreads(index)
        or sum(not mlp.follows and mlp.source is None for mlp in mlps) > 1
        or any(branch.has_gated_norm for branch in branches),
        has_up=beside or routed > 0 or any(mlp.gate.is_fused for mlp in mlps),
        output_norms=any(mlp.output is not None or mlp.factor != 1.0 for mlp in mlps),
        may_vanish=may_vanish(adapter),
        source=None if attention is None else attention.source,
        ahead=any(mlp.source is not None for mlp in mlps),
        kernelless=attention is not None and _has_no_kernel(adapter, index),
        recurrent=attention is not None and attention.is_recurrent,
        keys=0 if mixer is None else mixer.keys,
        looks=attention is not None and adapter.sides(index) is not None,
        read=1 if attention is None else attention.v.shape[1] // adapter.hidden_size,
        shifted=2 * any(branch.front is not None for branch in branches),
        made=_made(adapter, index, layer),
        recorded=2 * adapter.spreads(index) + (routed > 0),  # what enters convolutions, and what experts read
    )


def _made(adapter: Adapter, index: int, layer: Layer) -> int:
    """The numbers in weights of a layer that no module holds: with an adapter, or of two projections in a row."""
    kind = adapter.kind(index)
    found = [layer.attention.v] if kind.v_adapter is not None else []
    for mlp in layer.mlps:
        found += [mlp.gate, mlp.up] if kind.gate_adapter is not None else []
        found += [mlp.down] if kind.down_behind is not None else []
    return sum(one.shape[0] * one.shape[1] for one in found if one is not None)


def _has_no_kernel(adapter: Adapter, index: int) -> bool:
    """True if Triton has no kernel for the attention of layer ``index``, whatever the prompt (see its `no_kernel`)."""
    attention, sparse = adapter.layer(index).attention, adapter.selects is not None
    of_values = attention.value_norm is not None or attention.source is not None
    return attention.is_recurrent or attention.scales_heads or of_values or sparse or adapter.chunks(index)


def named_components(kind: ComponentKind, adapter: Adapter, length: int) -> tuple[int, bool]:
    """Return how many named components a prompt will have, and True if that is known before it is traced."""
    if isinstance(kind, Neurons):
        size = layer_sizes(adapter)[kind.resolve(adapter)]
        return size.reached(length), all(share == 1 for _, share in size.mlps)
    if isinstance(kind, Features):
        return kind.sae.W_dec.shape[0], False
    if isinstance(kind, Heads):
        return layer_sizes(adapter)[kind.resolve(adapter)].heads, True
    return len(kind.names(adapter, [""] * length)), True


def has_bias(kind: ComponentKind, adapter: Adapter, end: int | None, allocation: Allocation) -> int:
    layer = adapter.layer(kind.resolve(adapter))
    of_attention = layer.attention is not None and layer.attention.has_bias
    own = {"heads": of_attention, "neurons": layer.has_mlp_bias}.get(kind.kind, False)
    if isinstance(kind, Features):
        own = getattr(kind.sae, "b_dec", None) is not None
    if isinstance(kind, Modules):
        own = (kind.which != "mlp" and of_attention) or (kind.which != "attention" and layer.has_mlp_bias)
    return int(own or meets_bias(kind, adapter, end, allocation))


def fewest_components(kind: ComponentKind, adapter: Adapter) -> int:
    """Return how many named components any prompt has at least, of a kind that depends on the prompt."""
    return layer_sizes(adapter)[kind.resolve(adapter)].reached(1) if isinstance(kind, Neurons) else 1


def reach(kind: ComponentKind, adapter: Adapter, end: int | None) -> tuple[int, int]:
    """Return the layers that components are carried through: the first, and the one after the last."""
    return kind.entry(adapter).layer, adapter.n_layers if end is None else end


def _holding_logits(adapter: Adapter, device: torch.device) -> int:
    """Heads whose logits the model's own attention holds at once, where a whole prompt passes it; else zero.

    That is so without a fused attention: the model has none, or torch none for keys and values of two widths.
    """
    if not adapter.one_by_one:  # a short prompt is compared
        return 0
    fused, most = getattr(adapter.model, "_supports_sdpa", True), 0
    for index in range(adapter.n_layers):
        attention = adapter.layer(index).attention
        if attention is None or attention.is_recurrent:
            continue
        if not fused or (device.type == "cpu" and attention.key_dim != attention.head_dim):
            most = max(most, attention.n_heads)
    return most


@dataclass(frozen=True)
class ForwardPass:
    """Bytes of the ``trace``, at the ``peak`` while it is taken, and ``held`` later; ``flop``.

    All but ``trace`` are zero where the trace was given.
    """

    trace: int
    peak: int
    held: int
    flop: float

    @staticmethod
    def of(adapter: Adapter, lengths: Sequence[int], traced: bool, device: torch.device) -> ForwardPass:
        positions, item, width = sum(lengths), adapter.dtype.itemsize, adapter.hidden_size
        layers = layer_sizes(adapter)
        of_layers = layer_bytes(adapter, adapter.dtype)
        trace = positions * (bytes_per_position(adapter, adapter.dtype) + selection_bytes(adapter, max(lengths)))
        if traced:
            return ForwardPass(trace, 0, 0, 0.0)
        streams = 0 if adapter.family.streams is None else adapter.width_at("resid_mid")
        always = 4 * _STREAMS * streams * positions  # what the model's own code holds to mix them
        always += _LOGITS * _holding_logits(adapter, device) * max(lengths) ** 2 * item
        together = max(lengths) if adapter.one_by_one else positions
        state, recorded, ahead, peak = positions * width * item, 0, together * sum(of_layers), 0
        ahead += state * sum(map(_gathered, map(adapter.kind, range(adapter.n_layers))))
        for size, mixer, own in zip(layers, mixer_sizes(adapter), of_layers, strict=True):
            recorded += size.recorded * state
            ahead -= together * own  # the last prompts' later layers are not recorded yet
            numbers = positions * max((2 if size.has_up else 1) * size.neurons, _qkv(size)) * item
            beside = max(numbers, 0 if mixer is None else mixer.forward(together, max(lengths), device.type == "cpu"))
            peak = max(peak, recorded + beside - ahead)
        flop = 2 * positions * sum(size.parameters(width) for size in layers)
        return ForwardPass(trace, trace + state + always + max(peak, 0), trace, flop)


def _gathered(kind: Family) -> int:
    """Return how many streams of a layer are copied when the forward pass is over, and part of no pass."""
    return 0 if kind.streams is None else kind.streams.gathered_streams


def _qkv(size: LayerSize) -> int:
    """Return the numbers per position of attention's projections."""
    return 0 if size.recurrent else 3 * size.o + 2 * size.v
