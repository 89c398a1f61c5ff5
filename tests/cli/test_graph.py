"""``depass-fast graph`` on the demo model."""

import json

from depass_fast import DePass, LogProb
from depass_fast.demo import load_demo
from tests.support.command import fail, one_thread, run  # noqa: F401 (a fixture)

GRAPH = ["graph", "--model", "demo", "--device", "cpu", "--prompt", "Nyria Morstam speaks"]


def test_text_and_file(capsys, tmp_path):
    out = tmp_path / "graph.json"
    text = run(capsys, *GRAPH, "--target", " Italian", "--target-kind", "log-prob", "--nodes", "30", "--out", str(out))
    graph = DePass(*load_demo()).graph("Nyria Morstam speaks", LogProb(" Italian"), nodes=30)
    alike = [line for line in str(graph).splitlines() if "graph |" not in line]
    assert [line for line in text.splitlines() if "graph |" not in line] == alike
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [node["node_id"] for node in found["nodes"]] == [node["node_id"] for node in graph.to_json()["nodes"]]


def test_flags_reach_the_graph(capsys):
    more = ["--kinds", "heads", "--rule", "half", "--nodes", "12", "--slug", "a-slug", "--scan", "demo"]
    found = json.loads(run(capsys, *GRAPH, *more, "--node-threshold", "0.95", "--position", "3", "--json"))
    assert {node["feature_type"] for node in found["nodes"]} >= {"lorsa", "embedding", "logit"}
    assert "cross layer transcoder" not in {node["feature_type"] for node in found["nodes"]}
    assert (
        found["metadata"]["generation_settings"] | {"rule": "half", "position": 3}
        == (found["metadata"]["generation_settings"])
    )
    assert (found["metadata"]["slug"], found["metadata"]["scan"]) == ("a-slug", "demo")
    assert found["metadata"]["pruning_settings"]["node_threshold"] == 0.95


def test_errors(capsys):
    assert "--position: a graph is of one position" in fail(capsys, *GRAPH, "--position", "1,2")
    assert "'softmax'" in fail(capsys, *GRAPH, "--rule", "softmax")
    assert "from 0 to 1" in fail(capsys, *GRAPH, "--node-threshold", "1.5")
    assert "must end in .json" in fail(capsys, *GRAPH, "--out", "graph.csv")
