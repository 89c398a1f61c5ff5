"""The declaration of a model family: the places and kinds of its modules. It is data, and runs nothing.

`docs/adding-a-family.md` shows it on a real one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .activation import Activation
from .recurrence import Recurrence
from .streams import Streams

Part = Callable[[Tensor], Tensor]
Mix = Callable[[Any], tuple[Tensor, Tensor, Tensor | None]]
Path = str | tuple[str, ...]  # names that changed from version to version: the first that exists


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: paths below a layer. The router is frozen.

    The weights and indices (T, K) of a position's experts are those that the model passes to its module of experts.
    Where the experts are a list of modules (older transformers), the router's output is taken. Where that is logits
    alone, it is their softmax and the top k of it, or the result of ``decide(layer, output)``. So it is with
    ``weighs_input``.

    The experts of a layer are two tensors below ``experts``, named by ``stacks``: (E, 2I, D) and (E, D, I), or
    ``transposed``. The rows of the first are all gates and then all ups, or ``interleaved``. Biases have the same names
    with `_bias`. With ``flat``, the number of experts, the tensors are three, each (E·I, D): gates, ups, and downs
    transposed. Where an expert is a module, as a shared one always is, ``gate``, ``up`` and ``down`` are its
    projections.
    """

    top_k: int
    dense: bool = False  # weights of all experts are passed on, (T, E); their shape tells, unless all are chosen
    normalised: bool = False  # the top k of a softmax over logits are made to sum to one
    router: Path = "mlp.gate"
    experts: Path = "mlp.experts"
    stacks: tuple[Path, ...] = ("gate_up_proj", "down_proj")
    flat: int | None = None
    transposed: bool = False
    interleaved: bool = False
    gate: str = "gate_proj"
    up: str | None = "up_proj"  # None: ungated, ``gate`` and the first of ``stacks`` are the only way in
    down: str = "down_proj"
    fused: bool = False  # ``gate`` is both projections, [gate; up]
    act_fn: Path = "act_fn"  # below an expert, or below ``experts``
    activation: Callable[[Any], Activation] | None = None  # of what holds ``act_fn``, if a neuron is not act_fn(g) · up
    decide: Callable[[nn.Module, Any], tuple[Tensor, Tensor]] | None = None
    shared: Path | None = None  # an expert that every position goes through
    shared_gate: Path | None = None  # the logit of that expert's weight
    factor: float = 1.0  # of every expert's output, beside the router's weight
    routed_factor: float = 1.0  # the same, of all experts but the shared one
    latent: tuple[Path, Path] | None = None  # projections (without biases) around all experts but the shared one
    weighs_input: bool = False  # the router's weight multiplies what an expert reads, the shared one excepted
    beside: Beside | None = None
    ahead: bool = False  # they read what the MLP of the layer before reads, through its norm (LongCat)
    # S experts that all positions are sent to, with tensors ``gate``, ``up`` (S, I, D) and ``down`` (S, D, I): their
    # numbers are behind those of the others, and ``decide`` gives their weights with the others'
    always: Path | None = None
    gives_back: int = 0  # so many indices behind those of the experts stand for one that gives back what it reads


@dataclass(frozen=True)
class Beside:
    """Norms of a mixture that stands beside the layer's own MLP (Gemma 4): paths below the layer.

    Both read the same residual stream: the MLP through the layer's `mlp_norm`, the experts through ``norm``. Each has
    an output norm of its own, and the layer's `mlp_output_norm` is on their sum.
    """

    norm: Path
    output_norm: Path
    mlp_output_norm: Path


@dataclass(frozen=True)
class InputGate:
    """A gate behind the MLP: ``down(act_fn(gate(x)) ⊙ e)`` with a norm on it; paths below the layer.

    x is the residual stream itself, and e an embedding of the layer's own of the token (Gemma 4). The layer is called
    with e by the ``argument`` of that name, or at the ``place`` of that number. e is frozen, like a router's weight.
    """

    gate: Path = "per_layer_input_gate"
    down: Path = "per_layer_projection"
    output_norm: Path = "post_per_layer_input_norm"
    act_fn: Path = "act_fn"
    argument: str = "per_layer_input"
    place: int = 1
    scale: Path | None = None  # factors (D,) of what the gate reads


@dataclass(frozen=True)
class Observed:
    """The way to Q, K and V in attention that does not go through transformers' interface.

    ``projections`` are paths below the attention's module. ``read(module, outputs, kwargs)`` gets that module, the
    outputs (1, T, C) of the projections in that order, and the named arguments that the module was called with. It
    returns q (1, H, T, d) and k, v (1, Hkv, T, d) after rotary embedding, and the logits' ``scale``. It adds ``window``
    for a layer that has its own (else the config's `sliding_window` holds) and, with ALiBi, ``key_bias``: a function
    from a prompt's length N to what is added to the logits of its keys, (N, H).
    """

    projections: tuple[str, ...]
    read: Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Mixer:
    """A recurrence in the place of a softmax: linear in its values, with everything else frozen (DESIGN.md section 10).

    ``projections`` are paths below the mixer's module. ``read(module, outputs, convolve)`` gets that module, the
    outputs (T, C) of the projections in that order, and a function that convolves (T, C') within every prompt, given
    a module of convolution and a part of its channels. It returns a :class:`Recurrence`. Where that is a softmax
    (``attends``), ``read`` also gets the named arguments that the module was called with.

    ``conv`` is the path below the layer of the convolution that values go through, ``conv_part`` their part of its
    channels; with ``conv_adds`` what it gives is added to them. ``taps`` (C, K) are those of one that is no module.
    ``value_ratio(c)`` is act(c) / c of the activation behind it, elementwise; None without one.
    """

    projections: tuple[str, ...]
    read: Callable[..., Recurrence]
    conv: Path | None = None
    conv_part: Part | None = None
    value_ratio: Callable[[Tensor], Tensor] | None = None
    attends: bool = False
    taps: Tensor | None = None
    conv_adds: bool = False


@dataclass(frozen=True)
class Keyed:
    """Values that are keys: turned by the rotary embedding, which is undone behind attention (DESIGN.md section 10).

    The embedding turns pairs of neighbours among the last ``turned`` channels of a head, by cos and sin (1, T,
    ``turned`` / 2), which ``embedding(module, kwargs)`` gives of the attention's module and what it is called with.
    ``projections`` are paths below that module; the first gives the keys. ``read(module, outputs)`` gets the module and
    their outputs (T, C) on one prompt. It returns the factors (T, C) of values, in float32 or wider.

    With a ``rate`` every window of so many positions is one more key, an entry, made of what `v_entries` gives; those
    of ``overlaps`` also reach into the window before (:func:`.keyed.entry_ratios`).
    """

    projections: tuple[str, ...]
    read: Callable[[Any, list[Tensor]], Tensor]
    embedding: Callable[[Any, dict[str, Any]], tuple[Tensor, Tensor]]
    turned: int
    rate: int | None = None
    overlaps: bool = False


@dataclass(frozen=True)
class HeadScale:
    """A factor of what heads give, by position and channel, in front of the output projection: a gate or a norm.

    ``read(module, outputs, heads)`` gets the attention's module, the outputs (T, C) of its ``projections`` and what the
    heads give (T, H·d). It returns the factors (T, H·d). ``constant(module, outputs)`` is what is added behind them,
    (T, H·d) or None.
    """

    projections: tuple[str, ...]
    read: Callable[[Any, list[Tensor], Tensor], Tensor]
    constant: Callable[[Any, list[Tensor]], Tensor | None] | None = None


@dataclass(frozen=True)
class HeadExperts:
    """A mixture of attention heads: every expert has a projection to queries and one from heads (JetMoE).

    Experts share keys and values: each has one head for every KV head. ``count`` experts have ``top_k`` of them chosen
    at every position by the module at ``router`` below the layer. ``decide`` gives weights and indices (T, K) from what
    that returns. The attention call is given the heads of the first choice, then those of the second, and so on, with
    keys and values repeated as often; the heads' outputs are multiplied by the weights. ``o_proj`` holds a tensor
    (E, D, Hkv·d), and ``bias`` is a path to what is added to the sum, below the layer.
    """

    count: int
    top_k: int
    router: Path
    decide: Callable[[Any], tuple[Tensor, Tensor]]
    bias: Path


@dataclass(frozen=True)
class Family:
    """The places of a model's parts: paths below the model, or below a layer. Defaults are Llama's.

    A part that a family does not have is None. A norm of a branch sits before it (`attention_norm`), on its output
    before that is added (`attention_output_norm`), or on the residual stream after it (`attention_stream_norm`).
    """

    decoder: Path | None = None  # the model without its unembedding; None: what transformers calls the base model
    layers: Path = "model.layers"
    # the number of the module of every layer, where one of ``layers`` has several layers, as declared here, or none
    homes: tuple[int, ...] | None = None
    embedding: Path = "model.embed_tokens"
    final_norm: Path | None = "model.norm"
    unembedding: Path = "lm_head"
    vocabulary: int | None = None  # the model drops the logits of the unembedding's rows from this one on
    project_out: Path | None = None  # between the final norm and the unembedding
    head: Path | None = None  # a head with `dense`, `act` and `norm` in front of the unembedding
    logit_scale: float = 1.0
    logit_cap: float | None = None  # c · tanh(logit / c)

    with_cache: bool = False  # a forward pass needs a cache: without one its states are float32 (xLSTM)

    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0  # γ is this much more than the stored weight (Gemma: 1)
    # of a module that has the norm itself as `norm`, the factors (..., D) of the norm's output (..., D) behind it
    norm_gate: Callable[[Any, Tensor], Tensor] | None = None
    parallel: bool = False  # the MLP reads what the attention reads
    factor: float = 1.0  # of what a branch adds to the residual stream
    # factors of the sum of the stream and what attention, or the MLP, adds to it
    attention_keeps: float = 1.0
    mlp_keeps: float = 1.0
    mlp_factor: float | None = None  # that of the MLP, where it is another one
    reads: float = 1.0  # the factor of what attention reads behind its norm, of one that is ``beside`` or has it

    kinds: tuple[Family, ...] | None = None  # the declaration of every layer, where these are of several kinds

    attention: Path | None = "self_attn"  # None: the layer does not mix positions
    mixer: Mixer | None = None  # the attention is a recurrence
    beside: Family | None = None  # softmax attention beside a ``mixer``, on the same normed input: they are added
    head_scale: HeadScale | None = None  # between the heads and `o_proj`
    keyed: Keyed | None = None  # values are keys
    head_experts: HeadExperts | None = None  # a router decides which heads a position has
    attention_norm: Path | None = "input_layernorm"
    attention_output_norm: Path | None = None
    attention_stream_norm: Path | None = None
    v_proj: Path = "self_attn.v_proj"
    v_second: Path | None = None  # another projection, whose outputs are behind those of `v_proj`; before a ``mixer``
    v_part: Part | None = None  # V's part of the outputs of a fused projection, which are the first axis
    v_adapter: Path | None = None  # two projections one behind the other, whose output is added to that of `v_proj`
    v_clip: float | None = None  # values, and queries and keys in front of the rotary embedding, are clamped to ± this
    v_norm: Path | None = None  # a norm (without β) on the output of `v_proj`, which then is a latent
    v_norm_factor: float = 1.0  # of that norm's output
    v_up: Path | None = None  # the projection from there to the values
    v_up_part: Part | None = None
    v_head_norm: Path | None = None  # a norm without weights of every head's values
    v_entries: Path | None = None  # the projection to what entries are made of, beside `v_proj`
    source: int | None = None  # the layer whose keys and values this one takes
    value_dim: int | None = None  # width of a head's values, where it is not that of its queries and keys
    key_dim: int | None = None  # width of a head's queries and keys, in the same case
    q_proj: Path = "self_attn.q_proj"  # to the queries; where these come from a latent, the projection behind it
    q_part: Part | None = None  # Q's part of the outputs of a fused projection, like `v_part`
    q_down: Path | None = None  # the projection to the latent of queries, in layers that have one
    q_latent_norm: Path | None = None  # the norm of that latent
    k_proj: Path = "self_attn.k_proj"
    k_part: Part | None = None
    # keys by way of the latent of values: K's part of `v_up`, and that of `v_proj` which all heads share behind it
    k_up_part: Part | None = None
    k_shared_part: Part | None = None
    # in models that have them
    q_norm: Path | None = ("self_attn.q_norm", "self_attn.q_layernorm", "self_attn.query_layernorm")
    k_norm: Path | None = ("self_attn.k_norm", "self_attn.k_layernorm", "self_attn.key_layernorm")
    qk_norm_last: bool = False  # these norms are behind the rotary embedding
    o_proj: Path = "self_attn.o_proj"
    o_front: Path | None = None  # a projection of heads in groups, in front of `o_proj`
    o_groups: int = 1
    o_bias: Path | None = None  # a bias that is added outside of `o_proj`; None in layers without
    observed: Observed | None = None  # where attention does not go through transformers' interface
    always_observed: bool = False  # also if other attention in the same file does (an image encoder's)
    eager_scale: Callable[[nn.Module], float] | None = None  # of the logits, where only eager attention knows of it
    alibi: bool = False  # `observed` gives a `key_bias`
    # the window of all layers, or of each, where no attention call announces it
    window: int | tuple[int | None, ...] | None = None
    chunked: bool = False  # these windows are chunks: a query sees those before it in its own one
    counts_positions: bool = False  # some layer counts positions by itself, whatever positions are passed
    sinks: bool = False  # every query also has a logit of nothing, which the call announces
    # the most keys that a query sees, where an indexer selects them and the attention call announces them (`indices=`)
    selects: int | None = None
    selects_by_mask: bool = False  # it announces nothing: what it selects is in the mask of the attention call
    key_block: int | None = None  # it selects blocks of so many keys for every KV head, and announces `block_indices=`
    indexer: Path = "self_attn.indexer"  # layers without it take the selection of the one before
    layer_windows: bool = False  # each layer applies the window it announces, in every version of transformers

    # a parameter (..., D) beside each norm: the branch reads that much of a position, and the rest of the one before
    attention_shift: Path | None = None
    mlp_shift: Path | None = None
    mlp_scale: HeadScale | None = None  # a factor of what the MLP gives, by position and channel, of its projections

    mlp: Path | None = "mlp"  # None: the layer has none
    mlp_norm: Path | None = "post_attention_layernorm"
    mlp_output_norm: Path | None = None
    mlp_stream_norm: Path | None = None
    mlp_bias: Path | None = None  # what is added to the sum of all experts, whatever their weights
    mlp_inner_norm: Path | None = None  # a norm (without β) between the activation and the down projection
    gate_proj: Path = "mlp.gate_proj"  # in an ungated MLP, the projection before the activation
    gate_part: Part | None = None
    gate_adapter: Path | None = None  # two projections, as `v_adapter`, beside that which gives gates and ups
    up_proj: Path | None = "mlp.up_proj"  # None: the MLP is ungated
    up_part: Part | None = None
    down_proj: Path = "mlp.down_proj"
    down_behind: Path | None = None  # one more projection, which reads what `down_proj` gives
    # a module or a plain function; None: the model's code alone names it, and it is ``curve``
    act_fn: Path | None = ("mlp.act_fn", "mlp.act", "mlp.activation_fn", "activation_fn")
    curve: Part | None = None
    activation: Activation | None = None  # of an MLP whose neurons are not act_fn(g) · up
    sparsity: float = 0.0  # the part of a normal distribution below which gates are cut off (Gemma 3n)
    experts: Experts | None = None  # in the layers whose MLP has a router
    input_gate: InputGate | None = None  # behind the MLP
    layer_factor: Path | None = None  # of the residual stream at the layer's end
    # several residual streams side by side, which every branch mixes; in ``kinds``, the way of each kind of layer
    streams: Streams | None = None
    # a module with a convolution along the positions, `conv1d`: what it makes of what a branch gives is added to that
    attention_conv: Path | None = None
    mlp_conv: Path | None = None
    # given the layer, factors (D,) of the stream and of what a branch adds to it, and a constant (D,) that is added
    attention_mix: Mix | None = None
    mlp_mix: Mix | None = None
    partial: tuple[str, ...] = ()  # parts, by their names here, that only some layers have

    @property
    def has_experts_ahead(self) -> bool:
        """True if its experts read what the layer before reads."""
        return self.experts is not None and self.experts.ahead


def third(index: int) -> Part:
    """One of the three equal parts [Q; K; V] of a fused projection."""
    return lambda weight: weight.chunk(3)[index]


def first_half(weight: Tensor) -> Tensor:
    """The gate's part of a fused [gate; up] projection."""
    return weight.chunk(2)[0]


def second_half(weight: Tensor) -> Tensor:
    """The up projection's part of it."""
    return weight.chunk(2)[1]


def of_each_head(heads: int, parts: int, index: int) -> Part:
    """One of ``parts`` equal parts of every head in a projection fused by head, as [q1; k1; v1; q2; k2; v2; ...]."""
    return lambda weight: weight.unflatten(0, (heads, parts, -1))[:, index].flatten(0, 1)


def read_plain(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Q, K and V of separate projections, as they are."""
    q, k, v = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in outputs)
    return {"q": q, "k": k, "v": v, "scale": q.shape[-1] ** -0.5}


def read_rotary(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Q, K and V of separate projections, with norms on Q and K and a rotary embedding of some or all dimensions."""
    q, k, v = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in outputs)
    if getattr(attention, "qk_layernorm", False):
        q, k = attention.q_layernorm(q), attention.k_layernorm(k)
    cos, sin = kwargs["position_embeddings"]
    width, rotate = cos.shape[-1], sys.modules[type(attention).__module__].apply_rotary_pos_emb
    turned = rotate(q[..., :width], k[..., :width], cos, sin)
    q, k = (torch.cat([new, x[..., width:]], dim=-1) for new, x in zip(turned, (q, k), strict=True))
    return {"q": q, "k": k, "v": v, "scale": attention.head_dim**-0.5}
