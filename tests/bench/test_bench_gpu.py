"""The parts of `bench.speed.gpu` that need no GPU."""

import json
from dataclasses import replace

import pytest
import torch

from bench.core.models import SHAPES
from bench.core.results import ROOT
from bench.report.gpu import README, between_marks
from bench.report.page import report
from bench.speed.gpu.machine import chunk_rows, gemm_rates
from bench.speed.gpu.predictions import Goal
from bench.speed.gpu.session import Session
from bench.speed.gpu.timeline import Span, spans_of, timeline
from bench.speed.gpu.variants import Comparison, compare, comparisons, in_place, missing, place_of, switched
from bench.speed.gpu.verification import verify_forward
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
    names = [comparison.name for comparison in comparisons("llama-2-7b", tiny=False)]
    assert len(names) == len(set(names)) == 9


def test_whose_forward_pass_is_timed_is_recorded():
    session = Session(torch.device("cpu"), tiny=True)
    verify_forward(session)
    assert [row["ours"] for row in session.sections["forward"]] == [True, True]


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path):
    session = Session(torch.device("cpu"), tiny=True, out=tmp_path / "gpu.json")

    def fails():
        raise ValueError("no such thing")

    assert not session.attempt("first", fails) and session.attempt("second", lambda: None)
    assert [failure["part"] for failure in session.failures] == ["first"]
    assert "no such thing" in (tmp_path / "gpu.json").read_text()


def test_the_readme_of_the_kernels_holds_the_table_that_the_report_makes():
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results").glob("*.json"))]
    page = README.read_text()
    assert between_marks(page, results) == page, "python -m bench.report bench/results/*.json --goals"


def test_a_goal_in_seconds_is_for_the_card_that_it_names():
    goal = Goal("heads", seconds=0.15)
    assert goal.reached("NVIDIA H200", 0.14, 0.1) and not goal.reached("NVIDIA H200", 0.16, 0.9)
    assert goal.reached("NVIDIA H100 80GB HBM3", 0.1, 0.9) is None
    assert Goal("tokens", of_gemm=0.85).reached("any", 9.0, 0.86)


def test_the_section_of_a_run_names_kernels_variants_and_failures():
    timing = {"median_s": 1e-3, "p20_s": 1e-3, "p80_s": 2e-3, "runs": 3}
    kernel = {"kernel": "mix", "case": "N=20", "dtype": "bfloat16", **timing, "gbytes_per_s": 9.0, "of_copy": 0.5}
    result = {
        "benchmark": "gpu",
        "environment": {"device": "a GPU", "date": "2026-11-28"},
        "rows": [],
        "kernels": [{**kernel, "flops": 1e9, "tflops": 1.0}],
        "variants": [
            {"comparison": "streams", "variant": "1 stream", **timing, "first_call_s": 2.0, "gemm_fraction": 0.8},
            {"comparison": "streams", "variant": "2 streams", "left_out": "there is no STREAMS"},
        ],
        "timelines": {"neurons": timeline([Span("gemm", 0.0, 9.0)])},
        "kernel_checks": [{"kernel": "mix", "case": "N=20", "dtype": "float16", "error": 1e-4, "right": True}],
        "failures": [{"part": "corners", "traceback": "..."}],
        "left_out": ["rivals"],
    }
    page = report([result])
    rows = ("| mix | N=20 | bfloat16 | 1 ms |", "there is no STREAMS", "| neurons | 0.0 ms |")
    for text in (*rows, "1.0e-04 in float16", "**Failed**: corners.", "the time was over: rivals."):
        assert text in page, text
