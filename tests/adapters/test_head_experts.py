"""A mixture of attention heads (JetMoE): which head is whose, where it is alive, and what is checked and refused."""

import pytest
import torch

from depass_fast import DePass, Heads, Tokens
from depass_fast.evaluate.interventions import HEADS, check_maskable
from depass_fast.trace.untouched import untouched_pass
from tests.support.family_models import available, build_variant
from tests.support.models import random_ids

pytestmark = pytest.mark.skipif(not available("jetmoe"), reason="not in this version of transformers")

IDS = torch.tensor(random_ids(7))
EXPERTS, KV, WIDTH = 4, 2, 8


def heads(dp: DePass) -> torch.Tensor:
    """The outputs of all heads of layer 0: (N, H, D)."""
    return dp.start(dp.trace(IDS), Heads(0)).dense()[:, : EXPERTS * KV]


def test_heads_that_share_a_kv_head_lie_side_by_side_and_are_alive_where_they_are_chosen():
    dp = DePass(build_variant("jetmoe").double())
    layer, seen = dp.adapter.block(0), []
    hook = layer.self_attention.experts.router.register_forward_hook(lambda module, args, out: seen.append(out[-1]))
    before = heads(dp)
    hook.remove()
    chosen = torch.zeros(len(IDS), EXPERTS, dtype=torch.bool).scatter_(1, seen[0].topk(2, dim=1).indices, True)
    assert torch.equal((before != 0).any(-1), chosen.repeat(1, KV))
    expert, kv = 1, 1
    with torch.no_grad():
        layer.self_attention.experts.output_linear.weight[expert, :, kv * WIDTH : (kv + 1) * WIDTH] = 0.0
    after, its = heads(dp), kv * EXPERTS + expert
    assert before[:, its].any() and not after[:, its].any()
    others = [head for head in range(EXPERTS * KV) if head != its]
    assert torch.allclose(after[:, others], before[:, others], rtol=0, atol=1e-12)


def test_other_code_is_refused_and_decisions_near_a_tie_are_told_apart():
    model = build_variant("jetmoe")
    own = untouched_pass(DePass(model).adapter, IDS)
    assert [(index, "chosen_heads" in its) for index, its in own.decisions] == [
        (index, of_heads) for index in range(3) for of_heads in (True, False)
    ]
    experts = model.model.layers[1].self_attention.experts
    reduce = experts.reduce
    experts.reduce = lambda x, topology: 1.3 * reduce(x, topology)
    with pytest.raises(RuntimeError, match="layer 1: .*self_attention.experts.output_linear computes something else"):
        DePass(model).attribute(IDS, Tokens(), 5)
    with pytest.raises(ValueError, match="a router chooses among its heads, which cannot be masked"):
        check_maskable(DePass(model), HEADS)


def test_a_head_in_a_graph_does_what_is_predicted():
    """In front of MLPs that write nothing, with norms held."""
    model = build_variant("jetmoe").double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.output_linear.weight.zero_()
    graph = DePass(model).graph(IDS, 7, nodes=60, kinds=["heads"])
    last = [node for node in graph.nodes if node.kind == "head" and node.layer == 2 and node.position == 6]
    assert len(last) == 2 * KV
    for node in last:
        one = graph.intervene(node, scale=-1.0, hold=["norms"])
        assert one.predicted == pytest.approx(one.actual, rel=1e-5, abs=1e-9)
