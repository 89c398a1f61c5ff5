"""Components over several ranks: what one process computes, whatever is asked for. The ranks are gloo processes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from depass_fast import Adjoint, Custom, DePass, Features, Heads, LogProb, Modules, Neurons, Subspaces, Tokens
from depass_fast import request as requests
from depass_fast.allocation import NAMES
from depass_fast.demo import load_demo
from tests.support.components import Dictionary, kinds
from tests.support.family_models import available, build_variant
from tests.support.models import build, random_ids
from tests.support.ranks import CAN_FORK, in_ranks, reductions

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="ranks are forked")

IDS, JAGGED = random_ids(9, seed=5), [random_ids(7, seed=4), random_ids(1, seed=3), random_ids(4, seed=2)]
PROMPT = "When Diane met Grace at the park, Grace handed the camera to"
VARIANTS = ("mixtral", "qwen2_moe", "gpt_neox: parallel", "opt: stream norms, projected embedding", "gpt_oss", "rwkv")


class Whole(Dictionary):
    """A dictionary whose features are all of the hidden state: every direction, and its opposite."""

    def __init__(self, width=32):
        super().__init__(width=width)
        eye = torch.eye(width)
        self.W_enc, self.W_dec = torch.cat([eye, -eye], 1), torch.cat([eye, -eye])
        self.b_enc, self.b_dec = torch.zeros(2 * width), torch.zeros(width)


def cases() -> dict:
    """Calls that take ``shard``, by a label."""
    demo, found = DePass(*load_demo()), {}
    width = demo.adapter.hidden_size

    def add(name, dp, prompt, *given, **more):
        found[name] = lambda shard: dp.attribute(prompt, *given, **{"shard": shard, **more})

    for name, kind in kinds(len(demo.tokenizer(PROMPT)["input_ids"]), width).items():
        add(f"demo, {name}", demo, PROMPT, kind, " Diane", contrast=" Grace")
    for rule in NAMES:
        for name, kind in {"tokens": Tokens(), "later": Tokens(1), "heads": Heads(0), "neurons": Neurons(1)}.items():
            add(f"{rule}, {name}", build("llama-biases"), JAGGED, kind, 5, allocation=rule, method="exact")
    for name, kind in kinds(9).items():
        add(f"jagged, {name}", build("qwen2"), IDS if name.startswith("custom") else JAGGED, kind)
    models = {name: DePass(build_variant(name)) for name in filter(available, VARIANTS)}
    for name in models:
        for kind in (Tokens(), Heads(0), Neurons(1)):
            add(f"{name}, {kind.kind}", models[name], JAGGED, kind, 5)
    if available("qwen4_exp_text"):  # several streams: what attention reads is another state than the one it adds to
        add("streams", DePass(build_variant("qwen4_exp_text")), JAGGED, Tokens(), 5)
    if available("zamba2"):  # recurrences, and several streams
        add("zamba2", DePass(build_variant("zamba2")), JAGGED, Heads(0), 5, value_activation="shared")
    add("float64", build("llama-biases", torch.float64), JAGGED, Tokens(), 5)
    add("complete features", build("llama-gqa"), JAGGED, Features(1, Whole(), "resid_pre"), 5)
    add("complete subspaces", build("llama-gqa"), JAGGED, Subspaces(1, [torch.eye(32)[:, :20], torch.eye(32)[:, 20:]]))
    states = build("llama-gqa").trace(IDS).resid(1)[:, None] * torch.tensor([0.25, 0.75])[:, None]
    add("complete custom", build("llama-gqa"), IDS, Custom(1, states), 5)
    add(
        "complete but for a position",
        build("llama-gqa"),
        IDS,
        Custom(1, states * (torch.arange(9) != 4)[:, None, None]),
    )
    add("all layers", demo, PROMPT, Heads(layers="all"), " Diane")
    add("all layers, biases", build("llama-biases"), JAGGED, Modules(layers="all"), [5, LogProb(7)])
    add("features of layers", build("qwen2"), JAGGED, Features(layers=[0, 2], sae=Dictionary(), site="resid_post"))
    add("positions", demo, PROMPT, Tokens(), position=[3, 0, -1])
    add("positions of a batch", build("llama-biases"), [JAGGED[0], JAGGED[2]], Tokens(1), position=[0, 3, 2])
    add("targets", demo, PROMPT, Tokens(), [" Diane", LogProb(), (" Diane", " Grace")])
    add("an end", build("llama-gqa"), JAGGED, Tokens(), torch.ones(32), end=2)
    add("continuation", demo, PROMPT, Heads(3), continuation=" Diane")
    add("streamed", build("llama-biases"), JAGGED, Tokens(), 5, stream=True)
    add("in small blocks", build("llama-biases"), JAGGED, Tokens(), 5, memory_budget=2_000)
    add("a few tokens only", build("llama-gqa"), [IDS[:2], IDS[:1]], Tokens(), 5, exclude_special=False)
    add("one component", build("llama-gqa"), JAGGED, Modules(1, which="mlp"), 5)
    add("adjoint", build("llama-gqa"), IDS, Neurons(0), 5, method=Adjoint(sample=4))
    add("way back", build("llama-gqa"), IDS, Neurons(layers="all"), 5, allocation="shapley")
    found["generation"] = lambda shard: demo.attribute_generation(PROMPT, max_new_tokens=2, shard=shard)
    found["trace"] = lambda shard: demo.attribute(demo.trace(PROMPT), Tokens(), shard=shard)
    found["ledger"] = lambda shard: build("llama-gqa").ledger(IDS, 5, shard=shard).heads(1)
    found["default"] = lambda shard: DePass(build("qwen2").model, shard=shard).attribute(IDS, Heads(1), 5)
    return found


def numbers(result) -> list[tuple]:
    """The labels, scores, logits and largest error of every result, and the backend's name."""
    if isinstance(result, list):
        return [one for part in result for one in numbers(part)]
    if hasattr(result, "by_layer") or type(result).__name__ == "LayeredAttribution":
        return [one for part in result for one in numbers(part)]
    if hasattr(result, "steps"):
        return [one for part in result.steps for one in numbers(part)]
    error = float(result.layer_errors.max()) if len(result.layer_errors) else 0.0
    return [(result.labels, result.scores, result.target_logits, error, result.backend, result.warnings)]


def asked_for_differently(rank: int) -> dict[str, str]:
    """The errors where ranks differ in what they ask for, or one has no room."""
    dp, group, said = build("llama-gqa"), dist.group.WORLD, {}
    states = torch.randn(9, 3, 32, generator=torch.Generator().manual_seed(rank))
    differing = {
        "prompt": lambda: dp.attribute(IDS[rank:], Tokens(), 5, shard=group),
        "components": lambda: dp.attribute(IDS, Heads(rank), 5, shard=group),
        "content": lambda: dp.attribute(IDS, Custom(1, states), 5, shard=group),
        "target": lambda: dp.attribute(IDS, Tokens(), 5 + rank, shard=group),
        "position": lambda: dp.attribute(IDS, Tokens(), 5, position=rank, shard=group),
        "allocation": lambda: dp.attribute(IDS, Tokens(), 5, temperature=1.0 + rank, shard=group),
        "method": lambda: dp.attribute(IDS, Neurons(0), 5, method="adjoint" if rank else "exact", shard=group),
        "memory": lambda: dp.attribute(IDS, Tokens(), 5, shard=group),
    }
    for name, call in differing.items():
        fitted = requests.fitted
        if name == "memory" and rank == 1:
            requests.fitted = no_room
        try:
            call()
            said[name] = ""
        except (ValueError, MemoryError) as error:
            said[name] = f"{type(error).__name__}: {error}"
        requests.fitted = fitted
    return said


def no_room(run, shape):
    raise MemoryError("it needs too much")


def in_a_mesh(rank: int) -> list:
    """Results by a mesh of all, and by a group of the first two; None on the others."""
    mesh, group = init_device_mesh("cpu", (dist.get_world_size(),)), dist.new_group([0, 1])
    by_mesh = build("qwen2").attribute(IDS, Tokens(), 5, shard=mesh).scores
    by_group = build("qwen2").attribute(IDS, Tokens(), 5, shard=group).scores if rank < 2 else None
    return [by_mesh, by_group]


def what_is_exchanged(rule: str) -> list[int]:
    """The bytes of every reduction of a run."""
    with reductions() as sizes:
        dp = build("llama-gqa", torch.float32)
        dp.attribute(IDS, Tokens(), 5, allocation=rule, method="exact", shard=dist.group.WORLD)
    return sizes


def work(rank: int, asked: dict) -> dict:
    """All that is asked of a rank."""
    return {
        "results": {name: numbers(call(dist.group.WORLD)) for name, call in asked.items()},
        "differing": asked_for_differently(rank),
        "mesh": in_a_mesh(rank),
        "bytes": {rule: what_is_exchanged(rule) for rule in ("softmax", "linear", "relu", "max", "half")},
    }


@pytest.fixture(scope="module")
def asked():
    return cases()


@pytest.fixture(scope="module")
def alone(asked):
    """The results of one process."""
    return {name: numbers(call(None)) for name, call in asked.items()}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.thorough)])
def world(request, asked, tmp_path_factory):
    """The number of ranks, and what each of them found: they are started once."""
    return request.param, in_ranks(request.param, tmp_path_factory.mktemp("ranks"), partial(work, asked=asked))


def faults(name: str, size: int, results: list[tuple], expected: list[tuple]) -> list[str]:
    """Every fault of the results of a rank."""
    limit, backend = 1e-12 if name == "float64" else 1e-5, f"torch, sharded over {size}"
    if name in ("adjoint", "way back", "ledger"):  # every rank by itself
        backend = "torch"
    elif name == "streamed":
        backend = f"torch, streamed, sharded over {size}"
    found = [] if len(results) == len(expected) else [f"{name}: {len(results)} results"]
    for (labels, scores, logits, error, used, warnings), alone in zip(results, expected, strict=False):
        off = float((scores - alone[1]).abs().sum()) / float(alone[1].abs().sum())
        found += [] if labels == alone[0] else [f"{name}: labels {labels}"]
        found += [] if off <= limit else [f"{name}: off by {off:.1e}"]
        found += [] if torch.allclose(logits, alone[2]) else [f"{name}: logits {logits}"]
        found += [] if error <= limit else [f"{name}: completeness {error:.1e}"]
        found += [] if (used, warnings) == (backend, alone[5]) else [f"{name}: {used}, {warnings}"]
    return found


def test_results_are_those_of_one_process(world, alone):
    size, found = world
    said = []
    for rank in range(size):
        for name, results in found[rank]["results"].items():
            said += faults(name, size, results, alone[name])
            for one, first in zip(results, found[0]["results"][name], strict=True):
                said += [] if torch.equal(one[1], first[1]) else [f"{name}: ranks differ"]
    assert not said


def test_ranks_that_ask_for_different_things_are_told_what_differs(world):
    size, found = world
    for rank in range(size):
        said = found[rank]["differing"]
        for name in ("prompt", "components", "target", "position", "allocation", "method"):
            assert said[name].startswith("ValueError: shard: the ranks do not ask for the same. "), name
            assert name in said[name].split("differ")[0] and f"On rank {rank} of {size}, " in said[name]
        assert "components differs" in said["content"]
        own = "it needs too much" if rank == 1 else "it does not fit on rank 1"
        assert said["memory"].startswith("MemoryError: ") and own in said["memory"]


def test_a_mesh_or_a_group_of_some_ranks(world):
    size, found = world
    expected = build("qwen2").attribute(IDS, Tokens(), 5).scores
    for rank in range(size):
        by_mesh, by_group = found[rank]["mesh"]
        assert torch.allclose(by_mesh, expected, atol=1e-6)
        assert by_group is None if rank > 1 else torch.allclose(by_group, expected, atol=1e-6)


def test_what_is_exchanged_is_what_the_docs_say(world):
    """Per layer the numbers of statistics, N·I of each, and the sums of states, N·D; in the last layer one position."""
    n, d, neurons, layers = len(IDS), 32, 48, 3
    positions = [n] * (layers - 1) + [1]
    tables = {"softmax": 2, "linear": 3, "relu": 1, "max": 2, "half": 0}
    for rule, count in tables.items():
        sums = n * d * 4 + sum(at * d * 4 for at in positions)  # at the start and behind every layer
        statistics = sum(4 * at * neurons * count for at in positions)
        alive = sum(4 * at for at in positions) if count else 0
        scores = 4 * n
        for each in world[1]:
            beside = sum(each["bytes"][rule]) - sums - statistics - alive - scores
            assert 0 < beside <= 1024, rule  # that they agree
