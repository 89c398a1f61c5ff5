"""Estimates of exact runs: every backend's cost model, applied to states that are carried together or one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from ..backends import reference_cost, stream_cost
from ..backends.reference import ReferenceBackend
from ..backends.stream import StreamBackend
from ..backends.torch import cost as torch_cost
from ..backends.torch.backend import TorchBackend
from ..backends.triton import cost as triton_cost
from ..backends.workload import Need, Workload
from .plan import BackendEstimate
from .shapes import ForwardPass

JOINTLY = {TorchBackend.name: torch_cost.needs, "triton": triton_cost.needs}  # backends that carry states together
SINGLY = {StreamBackend.name: stream_cost.needs, ReferenceBackend.name: reference_cost.needs}


def estimates(
    groups: Sequence[Sequence[Workload]], forward: ForwardPass, rates: Mapping[str, float | None]
) -> tuple[BackendEstimate, ...]:
    """Return what every backend of ``rates`` needs for ``groups`` of states.

    The states of a group are carried together if the backend can do that, else one after the other. ``rates`` are FLOP
    per second, None where the rate is not known. A name of none of the backends here is that of a rank's part.
    """
    return tuple(_estimate(name, groups, forward, rate) for name, rate in rates.items())


def _estimate(
    name: str, groups: Sequence[Sequence[Workload]], forward: ForwardPass, rate: float | None
) -> BackendEstimate:
    """The sum of the arithmetic, and the largest of what is held at a time."""
    if name in JOINTLY:
        needs = [_together(name, group) for group in groups]
        flop = sum(work.flop for group in groups for work in group)
    else:
        cost = SINGLY.get(name) or partial(stream_cost.sharded, streams=name.startswith(StreamBackend.name))
        needs = [cost(work) for group in groups for work in group]
        flop = sum(need.flop for need in needs)
    most = max(needs, key=lambda need: need.workspace + need.beside)
    return BackendEstimate(
        backend=name,
        flop=flop,
        workspace_bytes=most.workspace,
        peak_bytes=max(forward.peak, forward.held + most.beside + most.workspace),
        forward_bytes=forward.peak,
        host_bytes=most.host,
        seconds=None if rate is None else (flop + forward.flop) / rate,
    )


def _together(name: str, group: Sequence[Workload]) -> Need:
    """Requirements of states carried together.

    States that pass only the last layer are left out: one position of each remains.
    """
    under_way = [work for work in group if len(work.passed) > 1] or group[:1]
    return JOINTLY[name](Workload.join(under_way), len(under_way) > 1)
