"""The check of the activations: an MLP must compute with the up projection and the function that are read of it.

Most rules take the recorded activations as they are. A linear rule also needs how they came about. It is checked when
such a rule is first asked for, and again when the model's code, its hooks or its activation functions have changed.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch

from ..adapters import Adapter, Mlp
from ..adapters.stored import kind_of
from ..runtime.transfer import to_device
from .consistency import READING, Checked, Consistency, computation, normed
from .record import MlpTrace, Trace

_ROUNDINGS = 4  # half precision: epsilons of the dtype that a gated activation may be off

_checked = Checked()


@torch.no_grad()
def check_activations(adapter: Adapter, trace: Trace) -> None:
    """Compare recorded activations at a few positions with those of the recorded gates and of the up projections.

    A model is compared once. ``adapter.check_linear_rule`` comes first: what is missing is not looked for here.

    Raises:
        RuntimeError: they differ; the message names the layer and the module.
    """
    adapter = Adapter(adapter.model, adapter.family)  # with biases: the forward pass has them
    key = *computation(adapter.model), *(_identity(mlp) for i in range(adapter.n_layers) for mlp in adapter.mlps(i))
    if _checked.knows(adapter.model, key):
        return
    found = Consistency()
    for index, layer in enumerate(trace.layers):
        mlps = adapter.mlps(index)  # they hold the weights that are computed
        for part in layer.mlps:
            _compare(found, adapter, index, mlps[part.part], part)
    found.verdict("a linear rule would split something else; take another rule, such as 'softmax' or 'taylor'")
    _checked.remember(adapter.model, key)


def _identity(mlp: Mlp) -> tuple:
    """A key of an MLP's activation. It does not keep the function alive."""
    activation = mlp.activation
    assert activation is not None  # see check_linear_rule
    curve = getattr(activation.curve, "__func__", activation.curve)
    return weakref.ref(curve), activation.gate_limit, activation.up_limit, activation.up_offset


def _compare(found: Consistency, adapter: Adapter, index: int, weights: Mlp, part: MlpTrace) -> None:
    """Compare the first, the middle and the last activation of an MLP, or of an expert."""
    assert weights.activation is not None  # see check_linear_rule
    at = np.unique([0, len(part.act) // 2, len(part.act) - 1])
    rows = to_device(at, part.act.device)
    positions = rows if part.positions is None else part.positions[rows]
    resid = part.resid[positions]
    read = normed(weights.norm, resid).to(resid)
    read = read if part.input_weight is None else read * part.input_weight[rows, None].to(read)
    up = None if weights.up is None else weights.up.project(read)
    act = weights.activation(part.gate[rows], up)
    factors = part.behind(weights, rows, act.dtype)
    act = act if factors is None else act * factors
    found.compare(
        f"layer {index}: {_what_differs(adapter, index, weights)}",
        part.act[rows],
        act.to(part.act),
        tolerance=_tolerance(weights, part.act.dtype),
    )


def _tolerance(weights: Mlp, dtype: torch.dtype) -> float | None:
    """The tolerance of gated activations: wider where weights are computed, and in half precision.

    There a dozen roundings lie between the residual stream and the activation, in front of sums and behind them.
    """
    if weights.up is None:
        return None
    if kind_of(weights.up.module) is not None:
        return READING
    return _ROUNDINGS * torch.finfo(dtype).eps if dtype.itemsize < 4 else None


def _what_differs(adapter: Adapter, index: int, weights: Mlp) -> str:
    if weights.name:
        place = f"expert {weights.name} of {adapter.path(index, 'mlp')}"
        return f"the recorded activations of {place} are not those that its weights and its activation function give"
    gate, down = (adapter.path(index, part) for part in ("gate_proj", "down_proj"))
    times_up = "" if weights.up is None else f" times {adapter.path(index, 'up_proj')}"
    return f"{down} reads something else than the activation function of {gate}{times_up}"
