"""The consistency check of convolutions behind branches: what they are given and what the stream gains by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter, Branch
from .consistency import Consistency, experts_written, normed, rows
from .record import Trace


def check_spreads(adapter: Adapter, trace: Trace, records: list[dict[str, Any]], positions: list[int]) -> None:
    """Compare the trace with ``records``, at the packed ``positions`` that are checked.

    Raises:
        RuntimeError: naming the layer and the module.
    """
    found, at = Consistency(), torch.tensor(positions, device="cpu")
    for index, (layer, record) in enumerate(zip(trace.layers, records, strict=True)):
        if not layer.spreads:
            continue
        after = trace.resid(index + 1).to(layer.resid_mid.device)
        mlps = adapter.mlps(index)
        mixture = adapter.is_mixture(index)
        written = experts_written(layer, mlps, at) if mixture else record["mlp_written"]
        for module, branch, raw, before, behind in (
            ("attention", adapter.attention(index), record["attention_written"], layer.resid_pre, layer.resid_mid),
            ("mlp", mlps[0], written, layer.resid_mid, after),
        ):
            name, given = f"layer {index}: {adapter.path(index, module)}", record[f"{module}_given"]
            found.compare(
                f"{name} gives something else than what it writes to the convolution behind it",
                rows(given, at),
                branch.written(normed(branch.output, raw) if _is_norm(branch) else raw, None).to(given),
                rows(before, at),
            )
            _check_gain(found, name, branch, given, before, behind, trace, at)
    found.verdict()


def _is_norm(branch: Branch) -> bool:
    return branch.output is not None and not branch.output.is_factor


def _check_gain(
    found: Consistency,
    name: str,
    branch: Branch,
    given: Tensor,
    before: Tensor,
    behind: Tensor,
    trace: Trace,
    at: Tensor,
) -> None:
    """Check that the convolution of ``given`` leads from ``before`` to ``behind``, (T, D) each."""
    wide = torch.promote_types(given.dtype, torch.float32)
    spans = [trace.span(prompt) for prompt in range(trace.n_prompts)]
    spread = [given[span] if branch.spread is None else branch.spread.along(given[span].to(wide)) for span in spans]
    total = before.to(wide) + torch.cat(spread).to(wide)
    found.compare(
        f"{name} and the convolution behind it write something else than what the residual stream gains",
        rows(behind, at),
        rows(normed(branch.stream, total), at).to(behind),
        rows(before, at),
    )
