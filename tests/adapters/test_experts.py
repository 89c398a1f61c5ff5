"""Mixtures of experts: the routing that the model itself computed is frozen, and the experts' output biases count."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from bench.core.models import randomised
from depass_fast import DePass, Neurons, Tokens
from depass_fast.adapters import Experts, Mlp, sort_choices, without_biases
from depass_fast.adapters.experts import _choice, expert_mlps, route, watch_router
from depass_fast.backends import TorchBackend
from depass_fast.trace.size import trace_nbytes
from tests.support.components import kinds
from tests.support.family_models import VARIANTS, available, build_model, build_variant
from tests.support.models import random_ids

PROMPTS = [random_ids(9, seed=1), random_ids(4, seed=2)]
IDS = PROMPTS[0]


def with_biases(dtype: torch.dtype = torch.float32) -> DePass:
    """gpt-oss, whose experts are interleaved and transposed, with biases."""
    if "gpt_oss" not in CONFIG_MAPPING:
        pytest.skip("the installed transformers does not have gpt_oss")
    return DePass(build_variant("gpt_oss").to(dtype))


@pytest.mark.parametrize(
    "rule", ["softmax", "shapley", *(pytest.param(x, marks=pytest.mark.thorough) for x in ("linear", "half"))]
)
def test_biases_of_experts_agree_in_all_backends_and_prompts(rule):
    dp = with_biases(torch.float64)
    trace = dp.trace(PROMPTS)
    for label, kind in kinds(min(map(len, PROMPTS)), dp.adapter.hidden_size).items():
        if label.startswith("custom"):
            continue
        oracle = dp.decompose(trace, kind, allocation=rule, backend="reference")
        for options in ({"backend": "torch"}, {"memory_budget": 8_000}, {"stream": True, "memory_budget": 8_000}):
            if "memory_budget" in options and label not in ("tokens@0", "heads@0", "neurons@0"):
                continue
            rows = dp.decompose(trace, kind, allocation=rule, **options).rows
            assert (rows - oracle.rows).abs().max() <= 1e-11 * oracle.rows.abs().max(), (label, options)


def test_the_adjoint_sweep_knows_them():
    dp = with_biases()
    exact, found = (
        dp.attribute(IDS, Neurons(layers="all"), [None, (9, 3)], allocation="taylor", method=method)
        for method in ("exact", "adjoint")
    )
    for one, other in zip(found, exact, strict=True):
        assert one.labels == other.labels and "bias" in one.labels
        assert torch.allclose(one.scores, other.scores, atol=1e-5 * float(other.scores.abs().max()))


def test_an_experts_bias_counts_as_the_router_weighs_it():
    dp = with_biases()
    state, mlp = dp.start(dp.trace(IDS), Neurons(1)), dp.model.model.layers[1].mlp
    seen = []
    undo = mlp.router.register_forward_hook(lambda module, args, output: seen.append(_choice(output)))
    dp.model(torch.tensor([IDS]))
    undo.remove()
    weights, chosen = seen[0]
    expected = (weights[..., None] * mlp.experts.down_proj_bias[chosen]).sum(1)
    assert torch.allclose(state.dense()[:, state.labels.index("bias")], expected, atol=1e-5)
    assert not without_biases(dp.adapter).layer(1).has_mlp_bias


def test_a_trace_holds_their_weights_and_no_more():
    dp = with_biases()
    assert trace_nbytes(dp.model.config, [9, 4], torch.float32) == dp.trace(PROMPTS).nbytes


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("deepseek_v2", {"topk_method": "greedy"}),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
        ("deepseek_v3", {"n_group": 4, "topk_group": 2, "norm_topk_prob": True}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    ],
)
def test_the_mixtures_of_deepseek(model_type, changes):
    """Their sum is what the mixture writes, whatever groups, corrections and scales the router knows."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers does not have {model_type}")
    config = AutoConfig.for_model(
        model_type,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        first_k_dense_replace=1,
        routed_scaling_factor=1.7,
        **changes,
    )
    torch.manual_seed(0)
    block = randomised(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()).model.layers[1]
    block.mlp.gate.weight.normal_()
    experts = Experts(top_k=3, shared="mlp.shared_experts")
    seen, x = [], torch.randn(11, 32)
    undo = watch_router(block, experts, lambda *choice: seen.append(choice))
    own = block.mlp(x[None])
    undo()
    branch = {"norm": None, "output": None, "stream": None, "factor": 1.0, "keeps": 1.0}
    mlps, total = expert_mlps(block, experts, branch), torch.zeros(11, 32)
    for part in route(block, experts, x, seen[0][0], *sort_choices([seen[0][1]])):
        total[slice(None) if part.positions is None else part.positions] += part.act @ mlps[part.part].w_down.T
    assert len(mlps) == 9 and torch.allclose(total, own[0], atol=1e-5 * float(own.abs().max()))


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_a_shared_expert_without_neurons_is_none(model_type):
    if not available(model_type):
        pytest.skip("the installed transformers does not have it")
    dp = DePass(build_model(model_type, **{**VARIANTS[model_type][1], "n_shared_experts": 0}))
    result = dp.attribute(IDS, Neurons(1))
    assert result.completeness_error <= 1e-5 and not any("shared" in label for label in result.labels)
    assert trace_nbytes(dp.model.config, [len(IDS)], torch.float32) == dp.trace(IDS).nbytes


def test_what_a_router_hands_on():
    chosen = torch.tensor([[2, 0], [1, 2]])
    dense = torch.tensor([[0.4, 0.0, 0.6], [0.0, 0.7, 0.3]])
    expected = torch.tensor([[0.6, 0.4], [0.7, 0.3]])
    for values in ((torch.ones(2, 5), chosen, dense), (dense, chosen), (torch.ones(2, 3), expected, chosen)):
        weights, indices = _choice(values)
        assert torch.equal(weights, expected) and torch.equal(indices, chosen)


def test_where_all_experts_are_chosen():
    """Before transformers 5, gpt-oss hands on the weights of all, in another order than the indices."""
    dense, chosen = torch.tensor([[0.4, 0.6], [0.7, 0.3]]), torch.tensor([[1, 0], [0, 1]])
    assert torch.equal(_choice((dense, chosen), dense=True)[0], torch.tensor([[0.6, 0.4], [0.7, 0.3]]))
    assert torch.equal(_choice((dense, chosen))[0], dense)
    if "gpt_oss" in CONFIG_MAPPING:
        every = {**VARIANTS["gpt_oss"][1], "num_local_experts": 3, "num_experts_per_tok": 3}
        assert DePass(build_model("gpt_oss", **every)).attribute(IDS, Neurons(0)).completeness_error <= 1e-5


def test_what_experts_did_is_no_part_of_a_graph():
    """A graph would keep every earlier tensor alive."""
    for layer in with_biases().trace(IDS).layers:
        assert not any(tensor.requires_grad for tensor in layer.tensors())


def test_experts_that_cannot_be_read_are_refused():
    model = build_variant("qwen3_moe")
    model.model.layers[0].mlp.experts = nn.Module()
    with pytest.raises(ValueError, match="its experts are held by Module, and not as tensors; merge .* dequantise"):
        DePass(model)


def test_layers_that_choose_different_numbers_are_refused():
    if "hunyuan_v1_moe" not in CONFIG_MAPPING:
        pytest.skip("the installed transformers does not have hunyuan_v1_moe")
    with pytest.raises(ValueError, match="its layers choose different numbers of experts"):
        DePass(build_model("hunyuan_v1_moe", num_experts=4, moe_topk=[1, 2, 2], head_dim=8))


def test_results_are_verified_with_biases_too():
    for result in with_biases().attribute(PROMPTS, Tokens(), verify=True):
        assert result.verification.passed and result.completeness_error <= 1e-5


def test_a_constant_needs_no_gate(monkeypatch):
    """The gate's weight may have to be dequantised first, for nothing."""
    dp = DePass(build_variant("llama: biases"))
    trace, mlp = dp.trace(IDS), dp.adapter.layer(0).mlp
    monkeypatch.setattr(Mlp, "w_gate", property(lambda self: pytest.fail("it was read")))
    found = TorchBackend()._mlp_constant(dp.start(trace, Tokens()), mlp, trace.layers[0].mlp)
    assert torch.equal(found, mlp.down.bias)


def test_where_positions_are_sent_is_known_in_host_memory():
    choices = [torch.stack([torch.randperm(7)[:3] for _ in range(50)]) for _ in range(2)]
    for chosen, found in zip(choices, sort_choices(choices), strict=True):
        for expert in range(8):
            positions, ranks = (chosen == expert).nonzero(as_tuple=True)
            here = found.of_expert(expert)
            assert torch.equal(found.positions[here], positions)
            assert torch.equal(found.order[here], positions * 3 + ranks)
            assert found.host_positions[here].tolist() == positions.tolist()
    part = with_biases().trace(IDS).layers[0].mlps[0]
    on_host = part.host_positions
    assert on_host.tolist() == part.positions.tolist() and part.host_positions is on_host
    for other in (copy.deepcopy(part), replace(part, positions=part.positions.clone())):
        assert other.host_positions.tolist() == on_host.tolist()
    part.positions = part.positions[:1]  # of whoever takes a trace apart
    assert part.host_positions.tolist() == on_host[:1].tolist()
