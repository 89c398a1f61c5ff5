"""The traces of a layer's MLPs, made of what the hooks on them recorded."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..adapters import Adapter, ExpertAssignment, Mlp
from .record import MlpTrace


def mlp_traces(
    adapter: Adapter,
    index: int,
    record: dict[str, Any],
    assignment: ExpertAssignment | None,
    resid: Tensor,
    ahead: Tensor | None = None,
) -> tuple[MlpTrace, ...]:
    """Make the traces of the MLPs of layer ``index``, in the order of :meth:`Adapter.mlps`, of what was recorded.

    ``resid`` (T, D) is what they read, ``ahead`` what experts read where that is something else; a gate of the token's
    embedding reads what they leave.
    """
    found: list[MlpTrace] = []
    outer, mlps = record.get("mlp_out_scale"), adapter.mlps(index)
    if assignment is not None:
        routed = adapter.route(index, record["experts_input"], record["router_weights"], assignment)
        scale = outer if "experts_scale" not in record else outer * record["experts_scale"]
        read = resid if ahead is None else ahead
        found += [
            MlpTrace.of_expert(expert, resid=read, out_scale=scale, source=mlps[expert.part].source)
            for expert in routed
        ]
    if adapter.has_dense_mlp(index):
        found.append(_dense(record, resid, mlps, outer))
    if "token_gate" in record:
        found.append(
            MlpTrace(
                resid=record["gate_resid"],
                gate=record["token_gate"],
                act=record["token_act"],
                part=len(mlps) - 1,
                out_scale=record["token_scale"],
                factor=record["token_embedding"],
            )
        )
    return tuple(found)


def _dense(record: dict[str, Any], resid: Tensor, mlps: tuple[Mlp, ...], outer: Tensor | None) -> MlpTrace:
    """The trace of the MLP itself, which may stand beside experts and then has a weight of one."""
    part = next(number for number, mlp in enumerate(mlps) if mlp.is_dense)
    gate, act = record["gate"], record["act"]
    weight = act.new_ones(len(act)) if mlps[part].name else None
    if "dense_scale" not in record:
        given = {"inner_scale": record.get("inner_scale"), "out_ratio": record.get("mlp_out_ratio")}
        return MlpTrace(resid, gate, act, part, out_scale=outer, router_weight=weight, **given)
    assert outer is not None  # the norm on the sum
    return MlpTrace(resid, gate, act, part, out_scale=outer * record["dense_scale"], router_weight=weight)
