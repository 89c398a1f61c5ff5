"""The parts of `bench.speed.gpu` that need no GPU."""

from dataclasses import replace

import pytest
import torch

from bench.core.models import SHAPES
from bench.speed.gpu.machine import chunk_rows, gemm_rates
from bench.speed.gpu.session import Session
from bench.speed.gpu.timeline import Span, spans_of, timeline
from bench.speed.gpu.variants import Comparison, compare, comparisons, in_place, missing, place_of, switched
from bench.speed.gpu.workloads import Setup, Work


def test_a_timeline_tells_the_hosts_gaps_from_the_devices():
    spans = [
        Span("a", 100.0, 200.0, 10.0),
        Span("b", 203.0, 300.0, 20.0),  # called for long before: the device's own gap
        Span("a", 350.0, 400.0, 340.0),  # called for when nothing was left to do
        Span("c", 380.0, 450.0, 30.0),  # beside the one before
    ]
    found = timeline(spans)
    assert found["total_ms"] == pytest.approx(0.35) and found["busy_ms"] == pytest.approx(0.297)
    assert found["idle_ms"] == pytest.approx(0.053) and found["host_bound_ms"] == pytest.approx(0.05)
    assert [gap["count"] for gap in found["gaps"]] == [1, 0, 1, 0, 0]
    assert found["top"][0] == {"name": "a", "count": 2, "ms": pytest.approx(0.15)}
    assert timeline([])["host_bound_share"] == 0.0


def test_a_launch_is_found_by_its_correlation():
    events = [
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 5.0, "args": {"correlation": 7}},
        {"cat": "kernel", "name": "mix", "ts": 9.0, "dur": 2.0, "args": {"correlation": 7}},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 1.0, "dur": 9.0},
    ]
    assert spans_of(events) == [Span("mix", 9.0, 11.0, 5.0)]


def test_a_chunk_holds_whole_positions_within_the_workspace():
    assert chunk_rows(SHAPES["llama-2-7b"]) == 3 * 11009


def test_rates_are_weighted_by_operations():
    found = gemm_rates(SHAPES["llama-tiny"], torch.device("cpu"), tiny=True)
    assert [gemm.product for gemm in found.gemms] == ["V", "O", "gate", "down"]
    seconds, flops = (
        sum(values) for values in zip(*((g.timing["median_s"], g.flops) for g in found.gemms), strict=True)
    )
    assert found.best == pytest.approx(flops / seconds)


def test_a_switch_holds_during_calls_only():
    place = "bench.speed.gpu.workloads"
    with in_place(switched(place, "TARGET", 3)):
        assert place_of(place).TARGET == 3
    assert place_of(place).TARGET == 7
    assert missing(switched(place, "TARGET", 3)) is None
    assert (
        missing(switched("bench.speed.gpu.session.Session", "nothing", 3)) == "bench.speed.gpu.session.Session.nothing"
    )


def test_variants_are_compared_and_those_without_their_switch_are_named():
    session = Session(torch.device("cpu"), tiny=True)
    work = Work(replace(SHAPES["llama-tiny"], layers=2), "tokens", 4)
    setups = {"small": Setup({"memory_budget": 1 << 20}), "gone": switched("depass_fast.options", "NOTHING", 1)}
    with torch.no_grad():
        compare(session, Comparison("budgets", work, setups))
    left_out, row = sorted(session.sections["variants"], key=lambda r: r["variant"])
    assert left_out["left_out"] == "there is no depass_fast.options.NOTHING"
    assert row["variant"] == "small" and row["runs"] == 1 and row["first_call_s"] > 0
    assert len({comparison.name for comparison in comparisons("llama-2-7b", tiny=False)}) == 7


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path):
    session = Session(torch.device("cpu"), tiny=True, out=tmp_path / "gpu.json")

    def fails():
        raise ValueError("no such thing")

    assert not session.attempt("first", fails) and session.attempt("second", lambda: None)
    assert [failure["part"] for failure in session.failures] == ["first"]
    assert "no such thing" in (tmp_path / "gpu.json").read_text()
