"""Plans of components over several ranks: the first rank's part, and what would make a run fit that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from depass_fast import Features, Heads, Neurons, Tokens
from depass_fast.backends import ShardBackend, stream_cost
from depass_fast.options import Options
from depass_fast.planning import fit as fitting
from depass_fast.planning import planner
from depass_fast.planning.planner import for_config, make_plan
from depass_fast.planning.shapes import RunShape
from depass_fast.runtime.ranks import Ranks
from tests.support.components import Dictionary
from tests.support.devices import small_gpu
from tests.support.models import build, random_ids

GPU = torch.device("cuda", 0)


class OneOf(Ranks):
    """The first of so many ranks, without the others: what is reduced is as it is."""

    def __init__(self, size: int) -> None:
        self.rank, self.size, self.device = 0, size, torch.device("cpu")

    def _reduced(self, part, operation):
        return part


def sharded(adapter, size: int, **options) -> tuple:
    """A run of the first of so many ranks, and its options."""
    settings = Options(**options)
    run = settings.build(adapter)
    return replace(run, backend=ShardBackend(OneOf(size), adapter.device, run.compute_dtype)), settings


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", [Tokens(), Tokens(1), Heads(0), Neurons(0)])
def test_a_plan_counts_the_rows_of_the_first_rank_which_has_most(kind, size):
    dp, prompts = build("llama-biases"), [random_ids(11), random_ids(4)]
    plan, whole = (make_plan(RunShape(dp.adapter, [11, 4], kind, ranks=n)) for n in (size, None))
    state = dp.start(dp.trace(prompts), kind)
    held = []
    for rank in range(size):
        ranks = OneOf(size)
        ranks.rank = rank
        parts = [one.only(ranks.deal(len(one.extras), len(one.names))) for one in state.layout.components]
        held.append(sum(int(one.alive(torch.arange(n).numpy()).sum()) for one, n in zip(parts, (11, 4), strict=True)))
    assert plan.rows == held[0] == max(held) and sum(held) == whole.rows == state.layout.n_rows
    assert (plan.ranks, whole.ranks) == (size, None)
    assert plan.n_components == whole.n_components and f"{size}, of which this is the first" in str(plan)
    assert [e.backend for e in plan.estimates] == [
        f"torch, sharded over {size}",
        f"torch, streamed, sharded over {size}",
    ]
    assert plan.of() is plan.of("torch") is plan.estimates[0]


def test_eight_ranks_hold_an_eighth_of_a_7b_models_tokens():
    adapter = for_config(LlamaConfig(), torch.bfloat16)
    one, eight = (make_plan(RunShape(adapter, [2048], Tokens(), ranks=n), device=GPU) for n in (1, 8))
    assert 7.9 < one.state_bytes / eight.state_bytes <= 8 and one.trace_bytes == eight.trace_bytes
    assert eight.of().peak_bytes < one.of().peak_bytes - 0.8 * one.state_bytes
    assert eight.of().peak_bytes > eight.state_bytes + eight.trace_bytes + 2048 * 11008 * 8  # and the statistics
    streamed = eight.estimates[1]
    assert streamed.host_bytes == eight.state_bytes and streamed.peak_bytes < eight.of().peak_bytes


def test_kinds_that_every_rank_makes_whole_count_the_whole():
    adapter = for_config(LlamaConfig(), torch.bfloat16)
    plans = [make_plan(RunShape(adapter, [2048], Heads(0), ranks=n), device=GPU) for n in (2, 16)]
    whole = 2048 * 32 * 4096 * 4
    assert all(plan.of().peak_bytes > whole + plan.trace_bytes for plan in plans)
    assert plans[1].estimates[1].host_bytes > whole
    work, _ = planner._workload(RunShape(adapter, [64], Features(1, Dictionary(width=4096), "resid_pre"), ranks=2), GPU)
    assert work.made == 0 and stream_cost.sharded(work, False).host == 0


def test_what_does_not_fit_is_refused_with_a_number_of_ranks_that_does(monkeypatch):
    adapter = build("llama-gqa").adapter
    shape = RunShape(adapter, [60], Tokens(), ranks=2)
    room = fitting.least_bytes(make_plan(replace(shape, ranks=8)), "torch, sharded over 8")
    for module in (fitting, planner):
        monkeypatch.setattr(module, "available", lambda device: room)
    run, _ = sharded(adapter, 2)
    with pytest.raises(MemoryError, match=r"tokens: needs .* It fits with 8 ranks \(.* on each\)"):
        fitting.fitted(run, shape)
    fitted = fitting.fitted(sharded(adapter, 8)[0], replace(shape, ranks=8))
    assert isinstance(fitted.backend, ShardBackend) and fitted.backend.name == "torch, sharded over 8"


def test_a_part_that_does_not_fit_on_the_device_lies_in_host_memory(monkeypatch):
    placed = small_gpu(monkeypatch, [100], Tokens())
    shape = RunShape(placed, [100], Tokens(), ranks=2)
    room = fitting.least_bytes(make_plan(shape, device=GPU), "torch, streamed, sharded over 2")
    assert room < fitting.least_bytes(make_plan(shape, device=GPU), "torch, sharded over 2")
    for module in (fitting, planner):
        monkeypatch.setattr(module, "available", lambda device: room if device.type == "cuda" else 1 << 40)
    run, _ = sharded(build("llama-gqa").adapter, 2)
    backend = fitting.fitted(run, shape).backend
    assert (backend.name, backend.streams, backend.ranks.size) == ("torch, streamed, sharded over 2", True, 2)
    with pytest.raises(MemoryError, match=r"ranks \(.* on each\), or with stream=True \("):
        fitting.fitted(run, replace(shape, options=Options(stream=False)))
