"""DeepSeek V4: hyper-connections, keys that are values, compressed ones beside them, experts by hashes of tokens."""

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..activation import Activation
from ..family import Experts, Family, Keyed
from ..hyper_connections import HyperConnections, normed_first
from ..keyed import entry_ratios, key_ratios

MODEL_TYPES = ("deepseek_v4",)
_SPARSE, _HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"


def declare(config: Any) -> Family:
    near = Family(
        sinks=True,
        layer_windows=True,
        v_proj="self_attn.kv_proj",
        o_front="self_attn.o_a_proj",
        o_proj="self_attn.o_b_proj",
        o_groups=config.o_groups,
        keyed=Keyed(("kv_proj",), _read, _embedding, config.qk_rope_head_dim),
        streams=HyperConnections(
            config.hc_mult, normed_first("fn", "base", "scale"), normed_first("hc_fn", "hc_base", "hc_scale")
        ),
        counts_positions=True,  # windows that are compressed begin with the prompt
        experts=Experts(
            config.num_experts_per_tok,
            shared="mlp.shared_experts",
            activation=lambda held: _clamped(held.act_fn, held.limit),
        ),
    )
    kinds = {"sliding_attention": near}
    for kind in (_SPARSE, _HEAVY):
        keyed = Keyed(
            ("kv_proj", "compressor.kv_proj", "compressor.gate_proj"),
            partial(_read_entries, overlaps=kind == _SPARSE),
            _embedding,
            config.qk_rope_head_dim,
            rate=config.compress_rates[kind],
            overlaps=kind == _SPARSE,
        )
        kinds[kind] = replace(near, keyed=keyed, v_entries="self_attn.compressor.kv_proj")
    kinds[_SPARSE] = replace(kinds[_SPARSE], selects=config.index_topk, indexer="self_attn.compressor.indexer")
    return replace(near, kinds=tuple(kinds[kind] for kind in config.layer_types))


def _read(attention: Any, outputs: list[Tensor]) -> Tensor:
    return key_ratios(outputs[0], attention.kv_norm)


def _read_entries(attention: Any, outputs: list[Tensor], overlaps: bool) -> Tensor:
    keys, values, gates = outputs
    return torch.cat([_read(attention, [keys]), entry_ratios(values, gates, attention.compressor, overlaps)], 1)


def _embedding(attention: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return kwargs["position_embeddings"][attention.rope_layer_type]


@lru_cache(maxsize=8)  # the same for all experts and layers
def _clamped(act_fn: Any, limit: float) -> Activation:
    return Activation(act_fn, gate_limit=limit, up_limit=limit)
