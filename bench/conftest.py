"""The JSON of pytest-benchmark names the place of the measurement by our own facts, and no machine by its name."""

from __future__ import annotations

from dataclasses import asdict

from .core.results import environment


def pytest_benchmark_generate_machine_info(config) -> dict:
    from .speed.test_suite import SHAPE

    return {"environment": environment(), "shape": asdict(SHAPE)}


def pytest_benchmark_generate_commit_info(config) -> dict:
    return {"id": environment()["commit"]}


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """Leave out single rounds, and paths."""
    for bench in output_json["benchmarks"]:
        bench["stats"].pop("data", None)
        for name in ("fullname", "param", "options", "extra_info"):
            bench.pop(name, None)
