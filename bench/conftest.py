"""What the JSON of pytest-benchmark says about where it was measured: our own facts, and no machine's name."""

from __future__ import annotations

from dataclasses import asdict

from .harness import environment


def pytest_benchmark_generate_machine_info(config) -> dict:
    from .test_suite import SHAPE

    return {"environment": environment(), "shape": asdict(SHAPE)}


def pytest_benchmark_generate_commit_info(config) -> dict:
    return {"id": environment()["commit"]}


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """Leave out single rounds, and paths."""
    for bench in output_json["benchmarks"]:
        bench["stats"].pop("data", None)
        for name in ("fullname", "param", "options", "extra_info"):
            bench.pop(name, None)
