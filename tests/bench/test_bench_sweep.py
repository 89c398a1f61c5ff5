"""The benchmark of sweeps: verified before it is timed, its rows, and their section of the results page."""

from __future__ import annotations

import json

import pytest

from bench.report.page import section
from bench.speed import sweep
from depass_fast import DePass


def test_rows_and_their_section(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    sweep.main(["--tiny", "--part", "loop", "--part", "files", "--threads", "1", "--out", str(tmp_path / "rows.json")])
    result = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["part"], row["provider"]) for row in result["rows"]] == [
        ("loop", sweep.LOOP),
        ("loop", sweep.SWEEP),
        ("files", sweep.SWEEP),
        ("files", sweep.FILES),
    ]
    assert result["rows"][1]["max_error"] < sweep.TOLERANCE and result["rows"][1]["ratio"] > 0
    page = section(result)
    assert (
        "Sweeps" in page
        and page.count("| loop |") == page.count("| files |") == 2
        and "(goal ≥ 2.5×)" in capsys.readouterr().out
    )


def test_nothing_is_timed_that_differs(monkeypatch):
    honest = DePass.sweep

    def wrong(self, prompts, kind):
        for result in honest(self, prompts, kind):
            result.scores = result.scores * 1.01
            yield result

    monkeypatch.setattr(DePass, "sweep", wrong)
    with pytest.raises(RuntimeError, match="a sweep and a loop differ"):
        list(sweep.against_a_loop("tokens", sweep.random_prompts(8), 1))


def test_ratios_are_those_of_single_turns():
    ways = {"slow": lambda: sum(range(200_000)), "fast": lambda: sum(range(2_000))}
    slow, fast = sweep._compared("loop", "x", ways, 10, 3, "goal")
    assert slow.ratio is None and fast.ratio > 5 and fast.prompts_per_s > slow.prompts_per_s and fast.runs == 3
