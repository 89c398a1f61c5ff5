"""The workloads of `bench.speed.gpu` and their providers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from depass_fast import DePass, Heads, Neurons, Tokens
from depass_fast.backends import backend_status
from depass_fast.backends.torch import mlp
from depass_fast.options import Adjoint, BackendName

from ...baselines.published import Published, groups_for
from ...core.models import SHAPES, Model, Shape, floor_flops, random_prompt

TARGET = 7


@dataclass(frozen=True)
class Work:
    """``prompts`` prompts of ``length`` tokens, and the providers measured on them: by default the fastest backend.

    ``components`` are tokens, neurons (of layer 0), heads (of all layers), or all neurons (of all layers, by the
    adjoint sweep with ``refine`` of them propagated exactly, with this rule of allocation). ``runs`` are timed; with
    ``profile`` one more is profiled.
    """

    shape: Shape
    components: str
    length: int
    prompts: int = 1
    providers: tuple[str, ...] = ()
    refine: int = 0
    rule: str = "softmax"
    runs: int = 3
    profile: bool = False

    @property
    def name(self) -> str:
        how = f"refine {self.refine:,}" if self.refine else "screened"
        kind = {
            "neurons": "neurons of layer 0",
            "heads": "heads of all layers",
            "all neurons": f"all neurons, adjoint, {how if self.rule == 'softmax' else self.rule}",
        }.get(self.components, self.components)
        return f"{kind}, N={self.length}" + (f", {self.prompts} prompts" if self.prompts > 1 else "")

    @property
    def kind(self) -> str:
        """The kind of component and rule, by which it is verified."""
        return self.components if self.rule == "softmax" else f"{self.components}, {self.rule}"

    @property
    def flops(self) -> int:
        if self.components == "all neurons":
            # two passes, each forward twice and back once; the refined go half the way. A linear rule needs one, back
            each = 6 if self.rule == "softmax" else 1
            passes = each * self.length * self.shape.layers * (self.shape.layers - 1) // 2
            return (passes + self.refine * self.length * self.shape.layers // 2) * self.shape.flops_per_row
        layers = range(self.shape.layers) if self.components == "heads" else [0]
        return self.prompts * sum(floor_flops(self.shape, self.components, self.length, layer) for layer in layers)

    @property
    def groups(self) -> int:
        """The number of groups that the published algorithm must be cut into."""
        shape, components = self.shape, self.length if self.components == "tokens" else self.shape.intermediate
        return groups_for(shape.heads, shape.hidden, shape.intermediate, components, self.length, itemsize=2)


def full(shapes: list[str]) -> Iterator[Work]:
    """The library's workloads, the most telling first: the time may be over before the end."""
    first = SHAPES[shapes[0]]
    yield Work(first, "neurons", 20, runs=5, profile=True)
    yield Work(first, "tokens", 512, profile=True)
    yield Work(first, "tokens", 20, prompts=64, runs=10, profile=True)
    yield Work(first, "heads", 20, runs=10, profile=True)
    yield Work(first, "all neurons", 20, refine=1000, runs=10, profile=True)
    yield Work(first, "all neurons", 20, runs=10)
    yield Work(first, "all neurons", 20, rule="taylor", runs=10)


def others(shapes: list[str]) -> Iterator[Work]:
    """Other shapes, in which heads share keys and have biases."""
    for shape in (SHAPES[name] for name in shapes[1:]):
        yield Work(shape, "heads", 20, runs=6, profile=True)
        yield Work(shape, "tokens", 512)
    yield Work(SHAPES["opt-6.7b"], "neurons", 20)


def long(shapes: list[str]) -> Iterator[Work]:
    """The workload that takes as long as all others together."""
    yield Work(SHAPES[shapes[0]], "tokens", 2048, runs=1)


def rivals(shapes: list[str]) -> Iterator[Work]:
    """Other ways to the same scores, and the library's backends beside each other."""
    first, *rest = [SHAPES[name] for name in shapes]
    yield Work(first, "neurons", 20, providers=("published", *backends()))
    yield Work(first, "tokens", 20, prompts=64, providers=backends(), runs=2)
    yield Work(first, "heads", 20, providers=backends(), runs=4)
    yield Work(first, "tokens", 128, providers=("published", *backends()))
    yield Work(first, "tokens", 512, providers=("published", *backends()), runs=2)
    for shape in rest:
        yield Work(shape, "tokens", 128, providers=backends())
    yield Work(first, "neurons", 20, providers=("torch.compile",))  # it compiles for minutes


def tiny() -> Iterator[Work]:
    """The same kinds of workload on a tiny shape."""
    shape = SHAPES["llama-tiny"]
    yield Work(shape, "neurons", 5, runs=2, profile=True)
    yield Work(shape, "tokens", 9, runs=1)
    yield Work(shape, "tokens", 4, prompts=3, runs=1)
    yield Work(shape, "heads", 5, runs=1)
    yield Work(shape, "all neurons", 5, refine=20, runs=1)
    yield Work(shape, "all neurons", 5, runs=1)
    yield Work(shape, "all neurons", 5, rule="taylor", runs=1)


def tiny_rivals() -> Iterator[Work]:
    """The rivals on a tiny shape."""
    shape = SHAPES["llama-tiny"]
    everyone = ("published", "torch.compile", "torch")
    yield Work(shape, "neurons", 5, providers=everyone, runs=1)
    yield Work(shape, "tokens", 9, providers=everyone, runs=1)


@dataclass(frozen=True)
class Setup:
    """Options of DePass for one provider, and attributes of modules that are replaced.

    ``patches`` hold (module or class, attribute, value); they hold during every call.
    """

    options: dict[str, Any] = field(default_factory=dict)
    patches: tuple[tuple[str, str, Any], ...] = ()


def provider(name: str, work: Work, model: Model, setup: Setup | None = None) -> Callable[[], Tensor]:
    """A function that computes the scores of all components at the last position, forward pass included."""
    device = next(model.parameters()).device
    prompts = [random_prompt(work.shape, work.length, seed).to(device) for seed in range(work.prompts)]
    if name == "published":
        published = Published(model)
        if work.components == "tokens":
            return lambda: published.score(published.tokens(prompts[0], groups=work.groups), -1, TARGET)
        return lambda: published.score(published.neurons(prompts[0], 0, groups=work.groups), -1, TARGET)
    options = {} if setup is None else setup.options
    library = DePass(model, backend=cast(BackendName, name.removesuffix(".compile")), **options)

    def scores() -> Tensor:
        if work.components == "heads":
            return library.attribute(prompts[0], Heads(layers="all"), TARGET).scores
        if work.components == "all neurons":
            method, every = Adjoint(refine=work.refine, sample=0), Neurons(layers="all")
            rule = cast(Any, work.rule)
            return library.attribute(prompts[0], every, TARGET, method=method, allocation=rule).scores
        kind = Neurons(0) if work.components == "neurons" else Tokens()
        if work.prompts == 1:
            return library.attribute(prompts[0], kind, TARGET).scores
        return torch.cat([result.scores for result in library.attribute(prompts, kind, TARGET)])

    return compiled(scores) if name == "torch.compile" else scores


def compiled(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call with the torch backend's softmax over components by torch.compile; its products are GEMMs anyway."""
    # without a GPU this only shows that it can be traced
    how = "inductor" if torch.cuda.is_available() else "eager"
    torch.compiler.reset()
    softmax = torch.compile(mlp._softmax_segments, dynamic=True, backend=how)

    def patched() -> Tensor:
        # each size of 1 compiles anew, and there are more of them than the usual limit
        with mock.patch.object(mlp, "_softmax_segments", softmax), torch._dynamo.config.patch(recompile_limit=64):
            return call()

    return patched


def backends() -> tuple[str, ...]:
    """The library's backends that are worth timing here, the fastest first."""
    status = backend_status()
    return tuple(name for name in ("triton", "torch") if status[name] is None)


def fastest() -> str:
    """The backend that the library's own workloads are measured with."""
    return backends()[0]
