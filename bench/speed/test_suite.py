"""Every backend on every kind of component, capture and readout, at CPU size: ``pytest bench --benchmark-only``."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from depass_fast import ComponentKind, Custom, DePass, Features, Heads, Modules, Neurons, Subspaces, Tokens, Trace
from depass_fast.backends import BACKENDS, backend_status
from depass_fast.options import BackendName

from ..core.models import Shape, build_model, random_prompt

SHAPE = Shape("llama-128", 128, 352, 4, 8, 4, vocabulary=256)
LENGTH, TARGET = 24, 7
KINDS = ("tokens", "heads", "modules", "neurons", "subspaces", "features", "custom")


class Dictionary:
    """A sparse dictionary with random weights, as SAE Lens' look from outside."""

    def __init__(self, width: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.W_enc = torch.randn(width, size, generator=generator)
        self.W_dec = torch.randn(size, width, generator=generator) / width

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_enc)

    def decode(self, activations: Tensor) -> Tensor:
        return activations @ self.W_dec


@cache
def library() -> DePass:
    torch.set_num_threads(2)
    return DePass(build_model(SHAPE))


@cache
def traced() -> Trace:
    return library().trace(random_prompt(SHAPE, LENGTH))


def kind(name: str) -> ComponentKind:
    bases = torch.linalg.qr(torch.randn(SHAPE.hidden, 16, generator=torch.Generator().manual_seed(0))).Q
    halves = torch.stack([traced().resid(1) / 2, traced().resid(1) / 4], dim=1)
    return {
        "tokens": Tokens(),
        "heads": Heads(0),
        "modules": Modules(0),
        "neurons": Neurons(0),
        "subspaces": Subspaces(0, bases=(bases[:, :8], bases[:, 8:])),
        "features": Features(1, Dictionary(SHAPE.hidden, 512), site="resid_pre"),
        "custom": Custom(1, states=halves),
    }[name]


def require(backend: str) -> None:
    """Skip a backend that cannot run here, with the reason."""
    if reason := backend_status(torch.device("cpu"))[backend]:
        pytest.skip(reason)


@pytest.mark.parametrize("components", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attribute(benchmark, backend: BackendName, components: str) -> None:
    """From a trace to scores; verified before it is timed."""
    require(backend)
    what = kind(components)

    def run() -> Tensor:
        return library().attribute(traced(), what, target=TARGET, backend=backend).scores

    expected = library().attribute(traced(), what, target=TARGET, backend="reference").scores
    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-4)
    benchmark.group = components
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("length", [24, 96])
def test_capture(benchmark, length: int) -> None:
    """The recorded forward pass alone."""
    ids = random_prompt(SHAPE, length)
    benchmark.group = "capture"
    benchmark.pedantic(lambda: library().trace(ids), rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("targets", [1, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_readout(benchmark, backend: BackendName, targets: int) -> None:
    """Components at the last layer's output: nothing to propagate, only the final norm and the targets' directions."""
    require(backend)
    what, wanted = Neurons(SHAPE.layers - 1), list(range(targets))

    def run() -> Tensor:
        return library().attribute(traced(), what, target=wanted, backend=backend).scores

    expected = library().attribute(traced(), what, target=wanted, backend="reference").scores
    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-4)
    benchmark.group = "readout"
    benchmark.pedantic(run, rounds=20, warmup_rounds=2)
