"""The providers that are measured: each takes a workload to the scores of all its components at the last position.

`published` is the published algorithm, which computes the full final state and then the score; `depass_fast` is the
library through its public API, forward pass included, as it is for the published one; `depass_fast/trace` is the same
with the forward pass taken beforehand; `compat` is the published interface on the library, which like the published
code computes the full final state. `oracle` is the library's reference backend in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from depass_fast import ComponentKind, DePass, Neurons, Tokens
from depass_fast.compat import decomposed_state_manager

from ..core.models import SHAPES, Model, Shape, build_model, floor_flops, live_rows, random_prompt
from .published import Published

TARGET = 7
PROVIDERS = ("published", "depass_fast", "depass_fast/trace", "compat")


@dataclass(frozen=True)
class SinglePrompt:
    """Components of a prompt of ``length`` tokens; neurons are those of layer 0."""

    model: str
    components: str
    length: int

    @property
    def name(self) -> str:
        layer = " of layer 0" if self.components == "neurons" else ""
        return f"{self.components}{layer}, N={self.length}"

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]

    @property
    def kind(self) -> ComponentKind:
        return {"tokens": Tokens(), "neurons": Neurons(0)}[self.components]

    @property
    def rows(self) -> int:
        return live_rows(self.shape, self.components, self.length)[0]

    @property
    def flops(self) -> int:
        return floor_flops(self.shape, self.components, self.length)

    def build(self) -> tuple[Model, Tensor]:
        """Model and prompt."""
        return build_model(self.shape), random_prompt(self.shape, self.length)


def provider(name: str, work: SinglePrompt, model: Model, ids: Tensor) -> Callable[[], Tensor]:
    """A function that computes the scores (M,) by this provider, ready to be timed."""
    if name in ("published", "published/corrected"):
        published = Published(model, corrected=name != "published")
        if work.components == "tokens":
            return lambda: published.score(published.tokens(ids), -1, TARGET)
        return lambda: published.score(published.neurons(ids, 0), -1, TARGET)
    if name == "compat":
        manager = decomposed_state_manager(model, None)

        def scores() -> Tensor:
            if work.components == "tokens":
                return manager.compute_attribute_score(manager.get_last_layer_decomposed_state(ids)[0], -1, TARGET)
            return manager.compute_attribute_score(manager.get_mlp_neuron_decomposed_state(ids, 0), -1, TARGET)

        return scores
    oracle = name == "oracle"
    library = DePass(copy.deepcopy(model).double(), backend="reference") if oracle else DePass(model)
    prompt = library.trace(ids) if name == "depass_fast/trace" else ids
    return lambda: library.attribute(prompt, work.kind, target=TARGET).scores


def named_scores(name: str, work: SinglePrompt, scores: Tensor) -> Tensor:
    """The scores of the named components only (tokens or neurons), in float64: (M',).

    The neurons of `published` and `compat` come after the residual, the library's before `rest`. Tokens have neither.
    """
    count = work.length if work.components == "tokens" else work.shape.intermediate
    scores = torch.as_tensor(scores).double().flatten()
    return scores[-count:] if name.startswith(("published", "compat")) else scores[:count]


def error_against(oracle: Tensor, scores: Tensor) -> float:
    """Largest difference, relative to the largest score."""
    return float((scores - oracle).abs().max() / oracle.abs().max())
