"""A race of neurons, and its subject: a model, a prompt, and the neurons whose effects are asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.models import SHAPES, Model, Shape, build_model, random_prompt
from ...core.questions import demo_model, questions


@dataclass(frozen=True)
class NeuronRace:
    """Neurons of layer 0, or of every layer, of a random model's random prompt or of the demo's first question."""

    model: str  # "demo" or a name of core.models.SHAPES
    all_layers: bool
    length: int = 16  # of a random model's prompt

    @property
    def name(self) -> str:
        return "neurons of all layers" if self.all_layers else "neurons of layer 0"

    @property
    def shape(self) -> Shape:
        """The shape of a random model."""
        return SHAPES[self.model]

    def build(self, device: str = "cpu") -> Subject:
        if self.model == "demo":
            model, tokenizer = demo_model(device)
            question = questions(tokenizer, 2, device)[0]
            return Subject(model, question.ids, question.target, self.all_layers)
        shape = SHAPES[self.model]
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        model = build_model(shape, dtype, device=device).requires_grad_(False)
        return Subject(model, random_prompt(shape, self.length).to(device), 7, self.all_layers)


@dataclass
class Subject:
    """A model, a prompt (N,), a target, and the layers whose neurons take part; ablated activations become zero."""

    model: Model
    ids: Tensor
    target: int
    all_layers: bool

    @property
    def layers(self) -> range:
        return range(self.model.config.num_hidden_layers if self.all_layers else 1)

    @property
    def width(self) -> int:
        return self.model.config.intermediate_size

    @property
    def zero(self) -> Tensor:
        return torch.zeros(self.model.config.num_hidden_layers, self.width, device=self.ids.device)

    @property
    def neurons(self) -> int:
        return len(self.layers) * self.width
