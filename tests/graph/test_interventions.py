"""The model run with a node changed: where it is linear in the node, the effect is the predicted one."""

from dataclasses import replace

import pytest
import torch

from depass_fast import Contrast, DePass, Features
from depass_fast.trace.again import next_logits
from depass_fast.trace.exclusive import exclusive
from tests.support.components import Dictionary
from tests.support.family_models import build_variant
from tests.support.models import build, random_ids

IDS = random_ids(6, seed=3)
NAMES = ["gpt2", "gpt_neox: parallel", "olmo2: biases", "mixtral", "gpt_oss"]


def close(one, tight=1e-5):
    assert one.predicted == pytest.approx(one.actual, rel=tight, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_last_neurons_and_heads_do_what_is_predicted(name):
    """Behind the last layer is only the norm. In front of its MLP a head meets the MLP, unless it is in parallel."""
    model = build_variant(name).double()
    dp, ids = DePass(model), torch.tensor(IDS)[None]
    last, parallel = dp.adapter.n_layers - 1, dp.adapter.is_parallel
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad(), exclusive(dp.adapter):
        before = next_logits(dp.adapter, ids)
    graph = dp.graph(IDS, Contrast(7, 9), nodes=200)
    of_last = [node for node in graph.nodes if node.layer == last and node.position == 5 and node.activation]
    neurons = [node for node in of_last if node.kind == "neuron"][:2]
    heads = [node for node in of_last if node.kind == "head"][:2] if parallel else []
    assert neurons and (heads or not parallel)
    for node in neurons + heads:
        for given in ({}, {"scale": 1.5}, {"value": -node.activation}):
            one = graph.intervene(node, hold=["norms"], **given)
            close(one)
            assert one.after == pytest.approx(one.scale * one.before)
            assert one.target_before == pytest.approx(graph.activations[0], abs=1e-5)
        free = graph.intervene(node.id)
        assert free.predicted == pytest.approx(-node.share) and free.hold == ()
        assert free.actual != pytest.approx(free.predicted, rel=1e-7)  # the norm's scale has changed
    with torch.no_grad(), exclusive(dp.adapter):
        assert torch.equal(next_logits(dp.adapter, ids), before)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not any(hooks)


def test_a_small_change_of_a_head_is_linear_in_attention_alone():
    """In a model whose MLPs write nothing all is linear once norms and attention are held: any head, any token."""
    dp = DePass(build_variant("llama: MHA").double())
    with torch.no_grad():
        for index in range(dp.adapter.n_layers):
            dp.adapter.module(index, "down_proj").weight.zero_()
    graph = dp.graph(IDS, 7, nodes=40, kinds=["heads"])
    heads = [node for node in graph.nodes if node.kind == "head"]
    assert {node.layer for node in heads} == set(range(dp.adapter.n_layers))
    for node in [*heads[::6], graph.nodes[1], graph.nodes[4]]:
        close(graph.intervene(node, scale=-1.0, hold=["norms", "attention"]))
        assert graph.intervene(node, hold=["norms", "attention"]).hold == ("attention", "norms")


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
def test_features_are_changed_where_they_are(site):
    dp, sae = DePass(build_variant("llama: biases").double()), Dictionary(dtype=torch.float64)
    last = dp.adapter.n_layers - 1
    graph = dp.graph(IDS, 7, nodes=300, kinds=["neurons"], features=Features(last, sae, site))
    node = next(node for node in graph.nodes if node.kind == "feature" and node.position == 5)
    if site == "resid_post":
        close(graph.intervene(node, scale=2.0, hold=["norms"]))
        return
    small = graph.intervene(node, scale=1.001, hold=["norms"])  # something happens, and in proportion
    twice = graph.intervene(node, scale=1.002, hold=["norms"])
    assert abs(small.actual) > 1e-8 and twice.actual == pytest.approx(2 * small.actual, rel=1e-2)


def test_a_vector_is_read_again():
    dp = DePass(build_variant("llama: GQA").double())
    vector = torch.randn(dp.adapter.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    graph = dp.graph(IDS, vector, nodes=60)
    node = next(n for n in graph.nodes if n.kind == "neuron" and n.layer == 2 and n.position == 5)
    one = graph.intervene(node, hold=["norms"])
    close(one)
    assert one.target_before == pytest.approx(graph.activations[0], rel=1e-5)
    assert graph.to_json()["nodes"][0]["token_prob"] == 0.0


def test_refusals():
    graph = build("qwen2").graph(IDS, 7, nodes=10)
    seat = next(node for node in graph.nodes if node.kind in ("neuron", "head"))
    for node, given, message in (
        ("bias", {}, "'bias' cannot be changed"),
        ("target", {}, "'target' cannot be changed"),
        (seat, {"scale": 1.0, "value": 2.0}, "give either scale or value"),
        (graph.nodes[1], {"value": 2.0}, "has no activation to be set"),
        (seat, {"scale": float("nan")}, "scale: expected a finite number, got nan"),
        (seat, {"scale": 10**400}, "scale: expected a finite number, got 1000"),
        (seat, {"scale": 1e308}, "scale: with 1e.308 the model gives no finite target"),
        (seat, {"scale": "0"}, "scale: expected a finite number, got '0'"),
        (seat, {"scale": True}, "scale: expected a finite number, got True"),
        (seat, {"value": float("inf")}, "value: expected a finite number, got inf"),
        (seat, {"hold": ["gates"]}, "hold: expected a list of 'attention', 'norms'"),
        (seat, {"hold": "norms"}, "hold: expected a list"),
    ):
        with pytest.raises(ValueError, match=message):
            graph.intervene(node, **given)
    with pytest.raises(KeyError, match="'L9N1@2' is none of this graph"):
        graph.intervene("L9N1@2")
    with pytest.raises(ValueError, match="it holds no model to run"):
        replace(graph, model=None).intervene(seat)
    hybrid = DePass(build_variant("qwen3_next"))
    graph = hybrid.graph(IDS, 7, nodes=10)
    with pytest.raises(ValueError, match="held attention is for models"):
        graph.intervene(graph.nodes[1], hold=["attention"])


def test_changed_weights_are_noticed():
    dp = DePass(build_variant("llama: GQA"))
    graph = dp.graph(IDS, 7, nodes=10)
    with torch.no_grad():
        dp.model.lm_head.weight.mul_(2.0)
    with pytest.raises(ValueError, match="graph: the model's weights have changed"):
        graph.intervene(graph.nodes[1])
    with pytest.raises(ValueError, match="graph: the model's weights have changed"):
        graph.divide(graph.nodes[1], "target")
