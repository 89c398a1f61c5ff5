"""The workloads of `bench.speed.gpu` and their providers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast
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
    """``prompts`` prompts of ``length`` tokens, and the providers measured on them: by default this library's backends.

    ``components`` are tokens, neurons (of layer 0), heads (of all layers), or all neurons (of all layers, by the
    adjoint sweep with ``refine`` of them propagated exactly).
    """

    shape: Shape
    components: str
    length: int
    prompts: int = 1
    providers: tuple[str, ...] = ()
    refine: int = 0

    @property
    def name(self) -> str:
        kind = {
            "neurons": "neurons of layer 0",
            "heads": "heads of all layers",
            "all neurons": f"all neurons, adjoint, refine {self.refine:,}",
        }.get(self.components, self.components)
        return f"{kind}, N={self.length}" + (f", {self.prompts} prompts" if self.prompts > 1 else "")

    @property
    def flops(self) -> int:
        if (
            self.components == "all neurons"
        ):  # two passes, each forward twice and back once; the refined go half the way
            passes = 6 * self.length * self.shape.layers * (self.shape.layers - 1) // 2
            return (passes + self.refine * self.length * self.shape.layers // 2) * self.shape.flops_per_row
        layers = range(self.shape.layers) if self.components == "heads" else [0]
        return self.prompts * sum(floor_flops(self.shape, self.components, self.length, layer) for layer in layers)

    @property
    def groups(self) -> int:
        """The number of groups that the published algorithm must be cut into."""
        shape, components = self.shape, self.length if self.components == "tokens" else self.shape.intermediate
        return groups_for(shape.heads, shape.hidden, shape.intermediate, components, self.length, itemsize=2)


def full(shapes: list[str]) -> Iterator[Work]:
    """The workloads, the most telling first: the time may be over before the end."""
    first, *_ = every = [SHAPES[name] for name in shapes]
    everyone = ("published", "torch.compile", *backends())
    for shape in every:
        yield Work(shape, "neurons", 20, providers=everyone if shape == first else ())
        yield Work(shape, "tokens", 512)
        yield Work(shape, "tokens", 20, prompts=64)
        yield Work(shape, "heads", 20)
        yield Work(shape, "all neurons", 20, refine=1000)
        yield Work(shape, "tokens", 128, providers=("published", *backends()) if shape == first else ())
        if shape == first:
            yield Work(shape, "tokens", 2048, providers=("triton",))
    yield Work(SHAPES["opt-6.7b"], "neurons", 20)
    yield Work(first, "tokens", 512, providers=("published",))
    for shape in every:
        yield Work(shape, "tokens", 2048, providers=("torch",) if shape == first else ("triton", "torch"))
    yield Work(first, "tokens", 128, providers=("torch.compile",))  # it compiles for minutes


def tiny() -> Iterator[Work]:
    """The same kinds of workload on a tiny shape."""
    shape = SHAPES["llama-tiny"]
    everyone = ("published", "torch.compile", *backends())
    yield Work(shape, "neurons", 5, providers=everyone)
    yield Work(shape, "all neurons", 5, refine=20)
    yield Work(shape, "tokens", 9, providers=everyone)
    yield Work(shape, "tokens", 4, prompts=3)
    yield Work(shape, "heads", 5)


def provider(name: str, work: Work, model: Model) -> Callable[[], Tensor]:
    """A function that computes the scores of all components at the last position, forward pass included."""
    device = next(model.parameters()).device
    prompts = [random_prompt(work.shape, work.length, seed).to(device) for seed in range(work.prompts)]
    if name == "published":
        published = Published(model)
        if work.components == "tokens":
            return lambda: published.score(published.tokens(prompts[0], groups=work.groups), -1, TARGET)
        return lambda: published.score(published.neurons(prompts[0], 0, groups=work.groups), -1, TARGET)
    library = DePass(model, backend=cast(BackendName, name.removesuffix(".compile")))

    def scores() -> Tensor:
        if work.components == "heads":
            return library.attribute(prompts[0], Heads(layers="all"), TARGET).scores
        if work.components == "all neurons":
            method = Adjoint(refine=work.refine, sample=0)
            return library.attribute(prompts[0], Neurons(layers="all"), TARGET, method=method).scores
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


def backends() -> list[BackendName]:
    """The library's backends that are worth timing here."""
    names = [name for name, reason in backend_status().items() if reason is None and name != "reference"]
    return cast(list[BackendName], names)
