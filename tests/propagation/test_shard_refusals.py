"""The option ``shard``: what it takes, and what is refused before any work."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from depass_fast import DePass, Heads, Neurons, Options, Tokens
from depass_fast import options as option_module
from tests.support.models import build, random_ids

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")

IDS = random_ids(6)


@pytest.fixture
def group(tmp_path):
    """The group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_mesh_of_one_rank_is_fine(group):
    expected = build("qwen2").attribute(IDS, Tokens(), 5)
    mesh = init_device_mesh("cpu", (1,))
    for dp, options in ((DePass(build("qwen2").model, shard=mesh), {}), (build("qwen2"), {"shard": group})):
        found = dp.attribute(IDS, Tokens(), 5, **options)
        assert found.backend == "torch, sharded over 1" and found.labels == expected.labels
        assert torch.allclose(found.scores, expected.scores, atol=1e-6) and found.completeness_error < 1e-6
    assert "torch, sharded over 1" in str(dp.plan(6, Tokens(), shard=mesh, measure=False))
    streamed = dp.attribute(IDS, Tokens(), 5, shard=mesh, stream=True)
    assert streamed.backend == "torch, streamed, sharded over 1"


@pytest.mark.parametrize("shard", [True, 2, "cpu", [0, 1]])
def test_what_is_no_mesh(shard):
    with pytest.raises(TypeError, match="shard: expected a torch.distributed DeviceMesh of one dimension, or a Proc"):
        build("llama-gqa").attribute(IDS, Tokens(), shard=shard)


def test_a_mesh_of_two_dimensions(group):
    with pytest.raises(ValueError, match=r"shard: a mesh of 2 dimensions; .* Give a mesh of one."):
        DePass(build("llama-gqa").model, shard=init_device_mesh("cpu", (1, 1)))
    named = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "components"))
    with pytest.raises(ValueError, match=r"Give one of them, mesh\['replicas'\]"):
        DePass(build("llama-gqa").model, shard=named)
    assert DePass(build("llama-gqa").model, shard=named["components"]).attribute(IDS, Tokens(), 5)


def test_a_group_that_is_gone(group):
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="shard: its process group is not initialised, or no longer"):
        build("llama-gqa").attribute(IDS, Tokens(), shard=group)


def test_a_group_that_cannot_exchange_here(group, monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    with pytest.raises(ValueError, match="shard: its nccl group exchanges on GPUs, and the model is on a CPU"):
        Options(shard=group).build(build("llama-gqa").adapter)


def test_a_process_that_is_none_of_the_ranks(group, monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda group: -1)
    with pytest.raises(ValueError, match="shard: this process is none of its ranks"):
        Options(shard=group).build(build("llama-gqa").adapter)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "reference"}, "shard: the reference backend carries all components; take backend='torch'"),
        ({"verify": True}, "shard: verify=True recomputes with all components"),
        ({"allocation": lambda gates, t: gates.values}, "shard: <lambda> sees all components at once"),
    ],
)
def test_options_that_need_all_components(options, said, group, monkeypatch):
    dp = build("llama-gqa")
    monkeypatch.setattr(dp.adapter.model, "forward", None)  # no work
    with pytest.raises(ValueError, match=said):
        dp.attribute(IDS, Tokens(), shard=group, **options)


def test_a_model_over_several_devices(group, monkeypatch):
    monkeypatch.setattr(option_module, "is_spread", lambda adapter: True)
    with pytest.raises(ValueError, match="shard: the model's layers lie on several devices"):
        build("llama-gqa").attribute(IDS, Tokens(), shard=group)


@pytest.mark.parametrize(
    "call", ["decompose", "partition", "focus", "start", "carry", "explain_attention", "attention_credit"]
)
def test_calls_that_return_or_read_all_states(call, group):
    dp = build("llama-gqa")
    trace = dp.trace(IDS)
    given = {
        "focus": (trace, Tokens(), [1]),
        "carry": (trace, dp.start(trace, Tokens())),
        "explain_attention": (trace, Tokens(), 1),
    }
    with pytest.raises(ValueError, match=f"shard: {call} needs the states of all components, .* shard=None"):
        getattr(dp, call)(*given.get(call, (trace, Tokens())), shard=group)


def test_what_holds_no_states_is_each_ranks_own(group):
    dp = DePass(build("llama-gqa").model, shard=group)
    assert dp.attribute(IDS, Neurons(0), 5, method="adjoint").backend == "torch"
    assert dp.attribute(IDS, Heads(1), 5, allocation="half", method="adjoint").backend == "torch"
    assert torch.equal(dp.ledger(IDS, 5).heads(1).scores, build("llama-gqa").ledger(IDS, 5).heads(1).scores)
