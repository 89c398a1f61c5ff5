"""The methods of the race: each takes a prompt to one number per neuron, through the same call.

Ablations and attribution patching answer "by how much does the logit fall if this neuron is set to a given value".
DePass answers "which share of the logit did this neuron bring". The race compares the second question with the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from depass_fast import DePass, Neurons
from depass_fast.evaluate.methods.gradients import inputs_and_gradients
from depass_fast.options import BackendName, MethodName, RuleName

from ..core.models import Model
from .fair_ablation import FairAblation
from .published import Published, groups_for

ONE_BY_ONE, FAIR, PATCHING, PUBLISHED = "one at a time", "fair ablation", "attribution patching", "published DePass"
EXACT, ADJOINT, LINEAR = "depass_fast", "depass_fast, adjoint", "depass_fast, linear adjoint"
ABLATIONS = (ONE_BY_ONE, FAIR)  # these measure the effect; the others estimate it or ask another question


class Method(Protocol):
    def effects(self, ids: Tensor, target: int, layers: Sequence[int], values: Tensor) -> Tensor:
        """One number per neuron of ``layers``, read at the last position of ids (N,): (len(layers), I).

        ``values`` (L, I) are the values of ablated activations.
        """
        ...


def methods() -> dict[str, Callable[[Model], Method]]:
    """Constructors of the methods, by name. Each takes a Llama with eager attention."""
    return {
        ONE_BY_ONE: OneAtATime,
        FAIR: FairAblation,
        PATCHING: AttributionPatching,
        PUBLISHED: PublishedShares,
        EXACT: Shares,
        ADJOINT: lambda model: Shares(model, "adjoint"),
        LINEAR: lambda model: Shares(model, "adjoint", rule="taylor"),
    }


class OneAtATime:
    """Ablation as published: a whole forward pass for every neuron, through transformers."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @torch.no_grad()
    def effects(
        self, ids: Tensor, target: int, layers: Sequence[int], values: Tensor, neurons: Iterable[int] | None = None
    ) -> Tensor:
        """The effects of :class:`Method`; ``neurons`` limits the work to these of every layer."""
        which = range(values.shape[1]) if neurons is None else list(neurons)
        clean = self._logit(ids, target)
        return torch.stack(
            [
                torch.stack([clean - self._ablated(ids, target, layer, i, values[layer, i]) for i in which])
                for layer in layers
            ]
        )

    def _ablated(self, ids: Tensor, target: int, layer: int, neuron: int, value: Tensor) -> Tensor:
        def ablate(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            act = args[0].clone()
            act[..., neuron] = value
            return (act,)

        handle = self.model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(ablate)
        try:
            return self._logit(ids, target)
        finally:
            handle.remove()

    def _logit(self, ids: Tensor, target: int) -> Tensor:
        return self.model(ids[None], use_cache=False).logits[0, -1, target]


class AttributionPatching:
    """First-order ablation: the gradient of the logit by every activation, times what an ablation would change."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def effects(self, ids: Tensor, target: int, layers: Sequence[int], values: Tensor) -> Tensor:
        def logit() -> list[Tensor]:
            hidden = self.model.model(ids[None], use_cache=False).last_hidden_state[0, -1]
            return [hidden @ self.model.lm_head.weight[target]]

        ordered = sorted(layers)
        acts, (gradients,) = inputs_and_gradients([self.model.model.layers[i].mlp.down_proj for i in ordered], logit)
        found = {
            layer: (gradient * (act - values[layer].to(act))).sum(0)
            for layer, act, gradient in zip(ordered, acts, gradients, strict=True)
        }
        return torch.stack([found[layer] for layer in layers])


class PublishedShares:
    """DePass by the published algorithm, layer by layer, in as many groups as memory demands."""

    def __init__(self, model: Model) -> None:
        self.published = Published(model)

    def effects(self, ids: Tensor, target: int, layers: Sequence[int], values: Tensor) -> Tensor:
        groups, scores = self.groups(len(ids)), []
        for layer in layers:
            state = self.published.neurons(ids, layer, groups=groups)
            scores.append(self.published.score(state, -1, target)[1:])
        return torch.stack(scores)

    def groups(self, length: int) -> int:
        config, dtype = self.published.model.config, self.published.model.dtype
        heads, hidden, width = config.num_attention_heads, config.hidden_size, config.intermediate_size
        return groups_for(heads, hidden, width, width, length, dtype.itemsize)


class Shares:
    """DePass by this library: exact, by its adjoint sweep, or under a linear rule by its way back."""

    def __init__(
        self,
        model: Model,
        method: MethodName = "exact",
        backend: BackendName = "auto",
        rule: RuleName = "softmax",
    ) -> None:
        self.library = DePass(model, backend=backend, allocation=rule)
        self.method: MethodName = method

    def effects(self, ids: Tensor, target: int, layers: Sequence[int], values: Tensor) -> Tensor:
        return self.library.attribute(ids, Neurons(layers=list(layers)), target, method=self.method).scores
