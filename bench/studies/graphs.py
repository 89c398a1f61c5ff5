"""Graphs of a trained model: ``python -m bench.studies.graphs --model PATH [--out FILE.json] [--quick]``.

A graph of 200 nodes for each of some factual prompts and for a longer text: how long it takes, how large its file is,
how much of the influence ends in what was pruned, and how far sums are off. Then the model is run with single nodes
changed. What the graph predicts is compared with what happens, by Spearman's rank correlation over the nodes and by
how often the signs agree. Nodes are those of every eighth rank by their share in the log-probability of the model's own
next token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias

import torch

from depass_fast import DePass, Graph, LogProb
from depass_fast.adjoint.estimate import spearman

from ..core.cli import command, writable
from ..core.results import environment, write_results

Hold: TypeAlias = Literal["attention", "norms"]
FACTS = (
    "The capital of France is",
    "The largest planet in the solar system is",
    "Shakespeare wrote the famous tragedy Romeo and",
    "When Mary and John went to the store, John gave a drink to",
)
LONG = (
    "The Eiffel Tower stands in Paris. The city of Paris is the capital of France, and the river Seine flows through "
    "it. Every year millions of people come to see the museums, the churches and the old bridges. One of the most "
    "famous museums is the Louvre, where the Mona Lisa hangs. The painter of the Mona Lisa was Leonardo da"
)
WAYS: dict[str, tuple[float, tuple[Hold, ...]]] = {  # the factor of the activation, and what is held
    "taken out": (0.0, ()),
    "taken out, attention and norms held": (0.0, ("attention", "norms")),
}
NODES, EVERY = 200, 8


@dataclass
class GraphRow:
    """The graph of one prompt; ``agreement`` has, by way and kind of node, (Spearman's, signs that agree, nodes)."""

    prompt: str
    model: str
    tokens: int
    target: str
    seconds: float
    file_bytes: int
    nodes: int
    edges: int
    pruned_influence: float
    completeness_error: float
    agreement: dict[str, dict[str, tuple[float, float, int]]] = field(default_factory=dict)
    environment: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)


def measure(engine: DePass, model: str, prompt: str, nodes: int, interventions: bool) -> GraphRow:
    """Make the graph of a prompt, and intervene on its nodes."""
    graph = engine.graph(prompt, LogProb(), nodes=nodes)
    return GraphRow(
        prompt=prompt,
        model=model,
        tokens=len(graph.tokens),
        target=graph.target_name,
        seconds=graph.seconds,
        file_bytes=len(json.dumps(graph.to_json(), separators=(",", ":")).encode()),
        nodes=len(graph.seats),
        edges=len(graph.edges),
        pruned_influence=sum(node.influence for node in graph.nodes if node.kind == "others"),
        completeness_error=graph.completeness_error,
        agreement={way: agreement(graph, *given) for way, given in WAYS.items()} if interventions else {},
        environment=environment("cpu"),
    )


def agreement(graph: Graph, scale: float, hold: Sequence[Hold]) -> dict[str, tuple[float, float, int]]:
    """Return how predicted and actual effects agree over some of the heads and neurons, and over both."""
    ranked = sorted((n for n in graph.nodes if n.kind in ("head", "neuron")), key=lambda node: -abs(node.share or 0))
    found = [(node.kind, graph.intervene(node, scale=scale, hold=hold)) for node in ranked[::EVERY]]
    made = {}
    for kind in ("head", "neuron", "both"):
        each = [one for of, one in found if kind in (of, "both")]
        predicted, actual = (torch.tensor([getattr(one, name) for one in each]) for name in ("predicted", "actual"))
        alike = float((predicted.sign() == actual.sign()).double().mean())
        made[kind] = (float(spearman(predicted, actual)), alike, len(each))
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.studies.graphs", __doc__)
    parser.add_argument("--model", required=True, help="a folder or a GGUF file; 'demo' is the demo model")
    parser.add_argument("--name", default="SmolLM2-135M", help="the model's name in the results")
    parser.add_argument("--out", type=writable, help="write the rows to this JSON file")
    parser.add_argument("--prompts", type=int, default=len(FACTS), metavar="N", help="the first N factual prompts")
    parser.add_argument("--quick", action="store_true", help="one short prompt, and few nodes")
    options = parser.parse_args(arguments)
    if options.model == "demo":
        from depass_fast.demo import load_demo

        engine = DePass(*load_demo(), progress=False)
    else:
        engine = DePass.from_pretrained(options.model, dtype="float32", progress=False)
    rows = []
    for prompt in FACTS[:1] if options.quick else (LONG, *FACTS[: options.prompts]):
        row = measure(engine, options.name, prompt, 20 if options.quick else NODES, prompt != LONG)
        rows.append(row)
        said = f"{row.tokens:3} tokens {row.seconds:6.2f} s {row.file_bytes / 1e6:5.2f} MB {row.edges:7,} edges"
        off = f"pruned {row.pruned_influence:.0%}, error {row.completeness_error:.0e}"
        print(f"{prompt[:40]!r:44} {said}, {off}", flush=True)
        for way, kinds in row.agreement.items():
            said = ", ".join(f"{kind} {rank:.2f} ({signs:.0%})" for kind, (rank, signs, _) in kinds.items())
            print(f"    {way:38} Spearman (signs): {said}", flush=True)
        if options.out:  # what was measured is kept where the rest is cut short
            write_results(options.out, "graphs", rows, device="cpu")


if __name__ == "__main__":
    main()
