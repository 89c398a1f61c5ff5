"""The agreement of ranks that share the components of a prompt: all ask for the same, or all are told what differs.

Ranks that did different things would wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .components.base import ComponentKind
from .inputs.targets import TargetItem
from .request import Request

_COMPARED = 1024  # numbers of a tensor


def agreed(request: Request) -> Request:
    """Return the request, once all ranks have asked for the same. By a method without states every rank works alone.

    Raises:
        ValueError: on every rank, naming what differs.
    """
    ranks = request.run.ranks
    if ranks is None:
        return request
    ranks.check_alike(_marks(request))
    if request.method is None:
        return request
    settings = replace(request.settings, shard=None)
    return replace(request, settings=settings, run=settings.build(request.adapter))


def check_found(request: Request, **found: Any) -> None:
    """Compare what the ranks ``found`` in their forward passes, which may round differently.

    Raises:
        ValueError: on every rank, naming what differs.
    """
    if request.run.ranks is not None:
        request.run.ranks.check_alike(found)


def _marks(request: Request) -> dict[str, Any]:
    """Return what has to be the same on all ranks, by the name of the argument."""
    adapter, run = request.adapter, request.run
    return {
        "model": (type(adapter.model).__name__, adapter.n_layers, adapter.hidden_size, adapter.dtype),
        "prompt": [ids.tolist() for ids in request.prompts],
        "components": [_mark_of(kind, kind.resolve(adapter)) for kind in request.components.each(adapter)],
        "target": [[_target(item) for item in spec.items] for spec in request.targets],
        "position": request.reads,
        "end": request.end,
        "method": request.method,
        "allocation": (run.allocation.rule, run.allocation.temperature),
        "value_activation": run.shares_values,
        "exclude_special": [sorted(positions) for positions in request.excluded],
        "state_dtype": run.state_dtype,
        "compute_dtype": run.compute_dtype,
    }


def _mark_of(kind: ComponentKind, layer: int) -> tuple[Any, ...]:
    return kind.kind, layer, kind.site, getattr(kind, "labels", None), _samples(kind.user_tensors())


def _target(item: TargetItem) -> tuple[Any, ...]:
    vectors = () if item.vector is None else (item.vector,)
    return item.token, item.contrast, item.log_prob, _samples(vectors)


def _samples(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Return the shape of every tensor and some of its numbers, at equal distances."""
    return [(tuple(one.shape), _some(one.detach().reshape(-1))) for one in tensors]


def _some(numbers: Tensor) -> list[float]:
    return numbers[:: max(1, len(numbers) // _COMPARED)].to("cpu", torch.float64).tolist()
