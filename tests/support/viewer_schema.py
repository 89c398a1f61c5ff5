"""The fields that viewers of attribution graphs require of a file, as a JSON Schema in our own words.

It restates two sources, of which nothing is copied. hijohnnylin/neuronpedia: the published schema,
`apps/webapp/app/api/graph/graph-schema.json` at b8efe84, and what draws, `apps/webapp/app/[modelId]/graph/utils.ts` at
ebb8426. safety-research/circuit-tracer: `circuit_tracer/frontend/graph_models.py` at 196e2ce and
`circuit_tracer/frontend/assets/attribution_graph/util-cg.js` at d797c82. Every field of the two schemas is here, with
its type. Where they differ the stricter one counts: by circuit-tracer `feature` is never null, `layer` is a text, and
`transcoder_list` and all fields of `qParams` are required. `schema_version` and the types of nodes are those of the
viewers' code, and patterns and ranges are ours.
"""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {"type": "string"}
NUMBER: dict[str, Any] = {"type": "number"}
WHOLE: dict[str, Any] = {"type": "integer"}
PLACE: dict[str, Any] = {"type": "integer", "minimum": 0}
FRACTION: dict[str, Any] = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
DRAWN = [  # what Neuronpedia has a sign for; circuit-tracer's draws a dot for those that it does not know
    "embedding",
    "logit",
    "cross layer transcoder",
    "mlp reconstruction error",
    "lorsa",
    "bias",
]


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_SOURCES = ("feature_json_base_url", "neuronpedia_source_set", "neuronpedia_lorsa_source_set")
_SAID = ("description", "creator_name", "creator_url")
_GENERATOR = _object({}, dict.fromkeys(("name", "version", "url", "email"), TEXT))
_MADE = {"source_urls": {"type": "array"}, "generator": _GENERATOR, "create_time_ms": NUMBER}
_COUNTS = ("max_n_logits", "batch_size", "max_feature_nodes")
METADATA = _object(
    {"slug": TEXT, "scan": TEXT, "transcoder_list": _list(TEXT), "prompt_tokens": _list(TEXT), "prompt": TEXT},
    {
        "node_threshold": {**NUMBER, "minimum": 0, "maximum": 1},
        "schema_version": {"const": 1},
        "feature_details": _object({}, dict.fromkeys(_SOURCES, TEXT)),
        "info": _object({}, {**dict.fromkeys(_SAID, TEXT), **_MADE}),
        "generation_settings": _object({}, {**dict.fromkeys(_COUNTS, WHOLE), "desired_logit_prob": NUMBER}),
        "pruning_settings": _object({}, {"node_threshold": NUMBER, "edge_threshold": NUMBER}),
    },
)
VIEW = _object(
    {"pinnedIds": _list(TEXT), "supernodes": _list(_list(TEXT)), "linkType": TEXT, "clickedId": TEXT, "sg_pos": TEXT}
)
NODE = _object(
    {
        "node_id": {**TEXT, "pattern": "^[^,\\s]+$"},  # ids are put together with commas in addresses
        "jsNodeId": TEXT,
        "feature": WHOLE,
        "layer": {**TEXT, "pattern": "^(E|[0-9]+)$"},  # a number decides the row
        "ctx_idx": PLACE,
        "feature_type": {"enum": DRAWN},
        "clerp": TEXT,
    },
    {
        "token_prob": {**NUMBER, "minimum": 0, "maximum": 1},
        "is_target_logit": {"type": "boolean"},
        "run_idx": PLACE,
        "reverse_ctx_idx": PLACE,
        "influence": FRACTION,
        "activation": {"type": ["number", "null"]},
    },
)
# the viewers read the probability of a logit from behind "(p=" and its token from between quotes, and fail without
NODE["if"] = {"properties": {"feature_type": {"const": "logit"}}}
NODE["then"] = {"properties": {"clerp": {"pattern": '".*" ?\\(p=[0-9.]+\\)$'}}}
LINK = _object({"source": TEXT, "target": TEXT, "weight": NUMBER})

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    **_object({"metadata": METADATA, "qParams": VIEW, "nodes": _list(NODE), "links": _list(LINK)}),
}
