"""The results page, a section per result file."""

from __future__ import annotations

from . import ablation, adjoint, gpu, graphs, memory, rules, speeds, tables, trained

HEAD = """# Results

Made by `python -m bench.report bench/results/*.json`; do not edit. Times are medians with [p20, p80] of interleaved
runs; a row names their number. They leave out the first call, unless the row says otherwise. GFLOP/s are useful ones:
the floor of the workload (see `core/models.py`) over the time, for every provider. The machine's own GEMM rate is
measured in the same run: where there is a GEMM row, that of the two MLP products, interleaved with the others; on a GPU
that of a large square product, beforehand. Errors are relative to the largest score. "Without capture": the library's
forward pass was taken beforehand, the published one's was not. "Compat": the same calls through `depass_fast.compat`,
which returns the whole final state, as the published code does.
"""


SECTIONS = {
    "adjoint": adjoint.section,
    "ablation": ablation.section,
    "ablation-scale": ablation.scale_section,
    "gpu": gpu.section,
    "graphs": graphs.section,
    "grouping": tables.grouping,
    "layers": tables.layers,
    "ledger": rules.speed,
    "looking": tables.looking,
    "hybrid": tables.hybrid,
    "meta": memory.counted,
    "plan": memory.planned,
    "products": tables.products,
    "prompts": tables.prompts,
    "rules": rules.section,
    "scripts": tables.scripts,
    "suite": tables.suite,
    "sweep": tables.sweep,
    "trained": trained.section,
}


def report(results: list[dict]) -> str:
    """The whole page in Markdown."""
    return "\n\n".join([HEAD.rstrip(), *(section(result) for result in results)]) + "\n"


def section(result: dict) -> str:
    """The section of one result file."""
    kind = "suite" if "benchmarks" in result else result["benchmark"]  # pytest-benchmark writes its own format
    return SECTIONS.get(kind, speeds.section)(result)
