"""The MLPs of a layer, in the order of their numbers: experts, the MLP itself, the gate of the token's embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from . import experts
from .activation import Activation
from .dense import dense_mlp
from .family import Beside, Family, InputGate
from .maps import Linear, Norm
from .paths import below
from .weights import GATE, Mlp


def layer_mlps(
    block: nn.Module,
    kind: Family,
    branch: dict[str, Any],
    is_mixture: bool,
    inner: Norm | None = None,
    ahead: tuple[int, Norm] | None = None,
) -> tuple[Mlp, ...]:
    """All MLPs of a layer. ``branch`` holds the norms and the factors that the family declares of its MLP.

    ``inner`` is a norm in front of the down projection. ``ahead`` is the layer whose MLP's input experts read, with its
    norm, where that is another one. Raises ValueError if no neuron can carry it.
    """
    if inner is not None and (inner.bias is not None or inner.centred):
        raise ValueError("model: the norm inside its MLP has a bias or a mean, which no neuron can carry.")
    if kind.mlp_bias is not None:
        branch = {**branch, "stream": Norm(None, 0.0, below(block, kind.mlp_bias), is_factor=True)}
    if kind.layer_factor is not None:
        branch = {**branch, "stream": Norm(below(block, kind.layer_factor), 0.0, is_factor=True)}
    mixture = kind.experts if is_mixture else None
    if mixture is None:
        found: tuple[Mlp, ...] = (replace(dense_mlp(block, kind, branch), inner=inner),)
    elif ahead is not None:
        routed = experts.expert_mlps(block, mixture, {**branch, "norm": ahead[1]})
        routed = tuple(replace(one, source=ahead[0]) for one in routed)
        found = (*routed, replace(dense_mlp(block, kind, branch), name="shared"))
    elif mixture.beside is None:
        found = experts.expert_mlps(block, mixture, branch)
    else:
        norm, *outputs = map(plain_norm, beside_modules(block, mixture.beside))
        of_experts, of_mlp = ({**branch, "output": _in_front_of(one, branch["output"])} for one in outputs)
        routed = experts.expert_mlps(block, mixture, {**of_experts, "norm": norm})
        found = (*routed, replace(dense_mlp(block, kind, of_mlp), name="shared"))
    if kind.input_gate is None:
        return found
    return (*found, _gate(block, kind.input_gate, branch["stream"]))


def beside_modules(block: nn.Module, beside: Beside) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The norm that experts read through, that of what they give, and that of what the MLP beside them gives."""
    return below(block, beside.norm), below(block, beside.output_norm), below(block, beside.mlp_output_norm)


def inner_norms(block: nn.Module, kind: Family, is_mixture: bool) -> list[nn.Module]:
    """The norms of heads' values, in an MLP, of a mixture beside one, and behind a gate of the token's embedding."""
    found = []
    if kind.v_head_norm is not None and kind.source is None:
        found.append(below(block, kind.v_head_norm))
    if kind.mlp_inner_norm is not None and not is_mixture:
        found.append(below(block, kind.mlp_inner_norm))
    if kind.input_gate is not None:
        found.append(below(block, kind.input_gate.output_norm))
    if kind.streams is not None:
        found += kind.streams.norms(block)
    if is_mixture and kind.experts is not None and kind.experts.beside is not None:
        found += beside_modules(block, kind.experts.beside)
    return found


def plain_norm(module: nn.Module) -> Norm:
    """An RMSNorm that stores γ itself, or none."""
    return Norm(getattr(module, "weight", None), float(getattr(module, "eps", 1e-6)))  # type: ignore[arg-type]


def _in_front_of(first: Norm, second: Norm) -> Norm:
    """Two norms, one behind the other. The product of both scales is recorded; this one's own is the second's."""
    assert first.weight is not None and second.weight is not None
    return replace(second, weight=first.weight * second.weight)


def _gate(block: nn.Module, gate: InputGate, stream: Norm | None) -> Mlp:
    scale = None if gate.scale is None else Norm(below(block, gate.scale), 0.0, is_factor=True)
    return Mlp(
        norm=scale,
        output=plain_norm(below(block, gate.output_norm)),
        stream=stream,
        factor=1.0,
        keeps=1.0,
        gate=Linear(below(block, gate.gate)),
        down=Linear(below(block, gate.down)),
        name=GATE,
        activation=Activation(below(block, gate.act_fn)),
    )
