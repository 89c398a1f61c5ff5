"""Stand-ins for devices that this machine lacks."""

from typing import Any

import torch

from depass_fast.adapters import Adapter
from depass_fast.planning import fit as fitting
from depass_fast.planning import planner
from depass_fast.planning.shapes import RunShape
from tests.support.models import build


class Placed:
    """An adapter whose model is on another device, as it says."""

    unembedding_bias = None

    def __init__(self, adapter: Adapter, device: torch.device) -> None:
        self._adapter, self.device = adapter, device

    def layer_device(self, index: int) -> torch.device:
        return self.device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)


def small_gpu(monkeypatch, lengths, kind):
    """A stand-in for an adapter on a GPU that has memory for streaming only, beside a host with plenty."""
    adapter = build("llama-gqa").adapter
    gpu = torch.device("cuda", 0)
    placed = Placed(adapter, gpu)
    monkeypatch.setattr(fitting, "default_budget", lambda device: 1 << 20)
    monkeypatch.setattr(planner, "default_budget", lambda device: 1 << 20)
    monkeypatch.setattr(planner, "available", lambda device: None)
    plan = planner.make_plan(RunShape(placed, lengths, kind), device=gpu)
    room = fitting.least_bytes(plan, "torch, streamed")
    assert room < fitting.least_bytes(plan, "torch")
    for module in (fitting, planner):
        monkeypatch.setattr(module, "available", lambda device: room if device.type == "cuda" else 1 << 40)
    return placed
