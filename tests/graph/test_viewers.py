"""Files for circuit-tracer's and Neuronpedia's viewers: valid by their schema, and drawn without a failure."""

import json
from dataclasses import replace

import jsonschema
import pytest

from depass_fast import Contrast, DePass, LogProb
from depass_fast.demo import load_demo
from tests.support.models import build, random_ids
from tests.support.viewer_schema import SCHEMA

PROMPT = "When Diane met Grace at the park, Grace handed the camera to"


@pytest.fixture(scope="module")
def demo():
    return DePass(*load_demo())


def drawn(document):
    """Check all that the viewers make of a document before they draw it; return the nodes by id."""
    jsonschema.validate(document, SCHEMA)
    nodes, tokens = document["nodes"], document["metadata"]["prompt_tokens"]
    rows = [int(node["layer"]) for node in nodes if node["feature_type"] != "logit" and node["layer"] != "E"]
    assert max(rows) > 0  # Neuronpedia takes zero for none
    assert all(node["ctx_idx"] < len(tokens) for node in nodes)
    by_id = {node["node_id"]: node for node in nodes}
    assert len(by_id) == len(nodes)
    assert len({(node["layer"], node["feature"], node["ctx_idx"]) for node in nodes}) == len(nodes)  # hovered as one
    for link in document["links"]:
        assert link["source"] in by_id and link["target"] in by_id and link["source"] != link["target"]
    (logit,) = (node for node in nodes if node["feature_type"] == "logit")
    assert float(logit["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(logit["token_prob"], abs=1e-3)
    assert logit["clerp"].split('"')[1]
    levels = sorted(node["influence"] for node in nodes if node["influence"] is not None)
    assert levels[-1] == pytest.approx(1.0) and levels[-1] <= 1.0  # all are shown at the threshold of one
    return by_id


@pytest.mark.parametrize("target", [" Diane", LogProb(), Contrast(" Diane", " Grace")])
def test_document_of_a_text(demo, target, tmp_path):
    graph = demo.graph(PROMPT, target, nodes=40)
    graph.save(tmp_path / "graph.json", slug="who", scan="demo")
    document = json.loads((tmp_path / "graph.json").read_text(encoding="utf-8"))
    by_id = drawn(document)
    assert document == graph.to_json(slug="who", scan="demo")
    assert (document["metadata"]["slug"], document["metadata"]["scan"]) == ("who", "demo")
    sums = dict.fromkeys(by_id, 0.0)
    for link in document["links"]:
        sums[link["target"]] += link["weight"]
    given = [node for node in document["nodes"] if node["activation"] is not None]
    assert len(given) == 41
    for node in given:
        assert sums[node["node_id"]] == pytest.approx(node["activation"], rel=1e-4, abs=1e-5)
    kinds = [node["feature_type"] for node in document["nodes"]]
    assert kinds.count("embedding") == 14 and kinds.count("lorsa") == sum(n.kind == "head" for n in graph.nodes)
    pruned = graph.prune(0.6, 0.9).to_json()
    drawn(pruned)
    assert pruned["metadata"]["pruning_settings"] == {"node_threshold": 0.6, "edge_threshold": 0.9}


@pytest.mark.parametrize("name", ["llama-biases", "qwen2"])
def test_document_of_ids_without_a_tokenizer(name):
    graph = build(name).graph(random_ids(5), 7, nodes=12)
    document = graph.to_json()
    drawn(document)
    assert [node["clerp"] for node in document["nodes"] if node["feature_type"] == "bias"] == ["bias"]
    assert (document["metadata"]["slug"] and document["metadata"]["scan"] == "llama") or name != "llama-biases"


def test_tokens_that_viewers_would_stumble_over(demo):
    graph = demo.graph("Nyria Morstam speaks", 5, nodes=5)
    odd = ['a"b', "\n", "<script>", ",", "\u2028"]
    document = replace(graph, tokens=odd, target_text='a"\n').to_json()
    drawn(document)
    assert document["metadata"]["prompt_tokens"][:2] == ['a"b', "⏎"]
