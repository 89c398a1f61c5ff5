"""Hidden states of last tokens, and classifiers that are trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine import DePass
from ..trace.exclusive import exclusive
from .interventions import batches


class _FarEnough(Exception):
    """The last layer that is asked for was reached: the rest of the forward pass is left out."""


@torch.no_grad()
def last_hidden_states(engine: DePass, texts: Sequence[str], layers: Sequence[int]) -> Tensor:
    """Return the input of ``layers`` at the last token of every text: (texts, layers, D) float32, in host memory.

    The forward pass ends at the last of the layers. Texts of one length run together, equal ones once.

    Raises:
        ValueError: the engine has no tokenizer; a layer that the model does not have; a text without tokens.
    """
    tokenizer: Any = engine.tokenizer
    adapter = engine.adapter
    if tokenizer is None:
        raise ValueError("tokenizer: a classifier learns from texts, and this engine has none.")
    check_layers(engine, layers)
    rows = [tuple(tokenizer.encode(text)) for text in texts]
    if () in rows:
        raise ValueError(f"texts: {texts[rows.index(())]!r} has no tokens.")
    found: dict[tuple[int, ...], Tensor] = {}
    for batch in batches(rows):
        states = last_inputs(engine, torch.tensor(batch, device=adapter.device), layers)
        found |= zip(batch, states.float().cpu(), strict=True)
    return torch.stack([found[row] for row in rows])


def last_inputs(engine: DePass, ids: Tensor, layers: Sequence[int]) -> Tensor:
    """Return the input of ``layers`` at the last position of ids (B, N): (B, layers, D).

    The forward pass ends at the last of the layers. Gradients flow back where they are on.
    """
    seen: dict[int, Tensor] = {}
    with exclusive(engine.adapter) as undo:
        _watch(engine, layers, seen, undo)
        with suppress(_FarEnough):
            engine.adapter.run(input_ids=ids)
    return torch.stack([seen[layer].to(ids.device) for layer in layers], 1)


def check_layers(engine: DePass, layers: Sequence[int]) -> None:
    """Raise ValueError unless the model has these layers, one at least."""
    n_layers = engine.adapter.n_layers
    wrong = [layer for layer in layers if not 0 <= layer < n_layers]
    if wrong or not layers:
        given = f"{wrong[0]} is no layer" if wrong else "there is none"
        raise ValueError(f"layers: {given}; the model has layers 0 to {n_layers - 1}.")


def _watch(engine: DePass, layers: Sequence[int], seen: dict[int, Tensor], undo: ExitStack) -> None:
    """Keep the last position of what enters ``layers``, where a trace records it."""
    for layer in set(layers):

        def keep(module: Any, args: tuple, kwargs: dict[str, Any], layer: int = layer) -> None:
            x = args[0] if args else kwargs["hidden_states"]  # (B, N, D)
            seen[layer] = x[:, -1]
            if layer == max(layers):
                raise _FarEnough

        adapter = engine.adapter
        entering = adapter.module(layer, "attention_norm") or adapter.module(layer, "attention")
        undo.callback(entering.register_forward_pre_hook(keep, with_kwargs=True).remove)


@dataclass(frozen=True)
class Classifier:
    """A linear classifier of C classes: ``weight`` (C, D), whose rows sum to zero, and ``bias`` (C,), in float64."""

    weight: Tensor
    bias: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """Return the class of every row of x (N, D): (N,) int64."""
        return (x.double() @ self.weight.T + self.bias).argmax(-1)

    def basis(self) -> Tensor:
        """Return an orthonormal basis (D, r) of what the weights span, r = C - 1 unless they depend on each other."""
        left, sizes, _ = torch.linalg.svd(self.weight.T, full_matrices=False)
        return left[:, sizes > 1e-9 * sizes[0]]


def fit_classifier(x: Tensor, y: Tensor, classes: int, penalty: float = 1e-3, steps: int = 100) -> Classifier:
    """Fit a softmax regression of ``y`` (N,), classes 0 to ``classes`` - 1, on ``x`` (N, D), in float64.

    ``penalty`` is that of the squared weights, of x scaled to a standard deviation of one.

    Raises:
        ValueError: a class has no example.
    """
    missing = sorted(set(range(classes)) - set(y.tolist()))
    if missing:
        raise ValueError(f"texts: none is of class {missing[0]}, of the {classes} that are to be told apart.")
    x = x.double()
    mean, scale = x.mean(0), x.std(0) + 1e-6
    z = (x - mean) / scale
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(z @ weight.T + bias, y) + penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    final = weight.detach() / scale
    final = final - final.mean(0)  # the same probabilities
    return Classifier(final, bias.detach() - final @ mean)
