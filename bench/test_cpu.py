"""Every backend on every kind of component, at CPU size: ``pytest bench --benchmark-only``."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from depass_fast import ComponentKind, Custom, DePass, Heads, Modules, Neurons, Subspaces, Tokens, Trace
from depass_fast.backends import backend_status

from .harness import Shape, build_model, random_prompt

SHAPE = Shape("llama-128", 128, 352, 4, 8, 4, vocabulary=256)
LENGTH, TARGET = 24, 7
KINDS = ("tokens", "heads", "modules", "neurons", "subspaces", "custom")


def usable() -> list[str]:
    return [name for name, reason in backend_status().items() if reason is None]


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
        "custom": Custom(1, states=halves),
    }[name]


@pytest.mark.parametrize("components", KINDS)
@pytest.mark.parametrize("backend", usable())
def test_attribute(benchmark, backend: str, components: str) -> None:
    """From a trace to scores; verified before it is timed."""
    what = kind(components)

    def run():
        return library().attribute(traced(), what, target=TARGET, backend=backend)

    expected = library().attribute(traced(), what, target=TARGET, backend="reference").scores
    torch.testing.assert_close(torch.as_tensor(run().scores), torch.as_tensor(expected), rtol=1e-3, atol=1e-4)
    benchmark.group = components
    benchmark(run)


@pytest.mark.parametrize("length", [24, 96])
def test_capture(benchmark, length: int) -> None:
    """The recorded forward pass alone."""
    ids = random_prompt(SHAPE, length)
    benchmark.group = "capture"
    benchmark(lambda: library().trace(ids))
