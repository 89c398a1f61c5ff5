"""Stand-ins for devices that this machine lacks."""

from types import SimpleNamespace

import torch

from depass_fast.planning import fit as fitting
from depass_fast.planning import planner
from depass_fast.planning.shapes import RunShape
from tests.support.models import build


def small_gpu(monkeypatch, lengths, kind):
    """A stand-in for an adapter on a GPU that has memory for streaming only, beside a host with plenty."""
    adapter = build("llama-gqa").adapter
    gpu = torch.device("cuda", 0)
    placed = SimpleNamespace(
        **{name: getattr(adapter, name) for name in ("n_layers", "hidden_size", "dtype", "model")},
        has_alibi=adapter.has_alibi,
        has_sinks=adapter.has_sinks,
        experts_per_position=adapter.experts_per_position,
        kind=adapter.kind,
        path=adapter.path,
        config=adapter.config,
        weighs_inputs=adapter.weighs_inputs,
        selects=adapter.selects,
        layer=adapter.layer,
        is_mixture=adapter.is_mixture,
        module=adapter.module,
        final_norm=adapter.final_norm,
        final_norm_module=adapter.final_norm_module,
        unembedding_bias=None,
        device=gpu,
        layer_device=lambda index: gpu,
    )
    monkeypatch.setattr(fitting, "default_budget", lambda device: 1 << 20)
    monkeypatch.setattr(planner, "default_budget", lambda device: 1 << 20)
    monkeypatch.setattr(planner, "available", lambda device: None)
    plan = planner.make_plan(RunShape(placed, lengths, kind), device=gpu)
    room = fitting.least_bytes(plan, "torch, streamed")
    assert room < fitting.least_bytes(plan, "torch")
    for module in (fitting, planner):
        monkeypatch.setattr(module, "available", lambda device: room if device.type == "cuda" else 1 << 40)
    return placed
