"""DeepSeek V4: hyper-connections, keys that are values, compressed ones beside them, experts by hashes of tokens."""

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from torch import Tensor

from ..activation import Activation
from ..family import Experts, Family, Keyed
from ..hyper_connections import HyperConnections, normed_first
from ..keyed import read_entries, read_keys

MODEL_TYPES = ("deepseek_v4",)
_SPARSE, _HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"
_PRE = normed_first("fn", "base", "scale"), normed_first("hc_fn", "hc_base", "hc_scale")


def declare(config: Any) -> Family:
    near = Family(
        sinks=True,
        layer_windows=True,
        v_proj="self_attn.kv_proj",
        o_front="self_attn.o_a_proj",
        o_proj="self_attn.o_b_proj",
        o_groups=config.o_groups,
        keyed=Keyed(("kv_proj",), read_keys, _embedding, config.qk_rope_head_dim),
        streams=HyperConnections(config.hc_mult, *_PRE),
        counts_positions=True,  # windows that are compressed begin with the prompt
        experts=Experts(config.num_experts_per_tok, shared="mlp.shared_experts", activation=_of_experts),
    )
    kinds = {"sliding_attention": near}
    for kind in (_SPARSE, _HEAVY):
        keyed = Keyed(
            ("kv_proj", "compressor.kv_proj", "compressor.gate_proj"),
            partial(read_entries, overlaps=kind == _SPARSE),
            _embedding,
            config.qk_rope_head_dim,
            config.compress_rates[kind],
            kind == _SPARSE,
        )
        kinds[kind] = replace(near, keyed=keyed, v_entries="self_attn.compressor.kv_proj")
    kinds[_SPARSE] = replace(kinds[_SPARSE], selects=config.index_topk, indexer="self_attn.compressor.indexer")
    return replace(near, kinds=tuple(kinds[kind] for kind in config.layer_types))


def _of_experts(held: Any) -> Activation:
    return _clamped(held.act_fn, held.limit)


def _embedding(attention: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return kwargs["position_embeddings"][attention.rope_layer_type]


@lru_cache(maxsize=8)  # the same for all experts and layers
def _clamped(act_fn: Any, limit: float) -> Activation:
    return Activation(act_fn, gate_limit=limit, up_limit=limit)
