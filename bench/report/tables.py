"""Sections of the results page that are one table: grouped attribution, all layers, prompts per second, the suite."""

from __future__ import annotations

from ..core.markdown import duration, heading, mebibytes, table

GROUPING = """A layer's neurons of the demo model, decomposed in groups as the published algorithm does where memory
is short (`bench/studies/grouping.py`), against all of them at once, which is exact. Medians over {n_prompts} held-out
prompts. Error: ‖grouped - exact‖ / ‖exact‖ over all neurons; largest: the largest difference over the largest exact
score; sum: all neurons' scores over those of the exact decomposition, where 1 means that the shares still add up.
See `docs/grouping.md`."""

LAYERS = (
    "A decomposition for every start layer, all in one sweep against a loop over the layers; goal: twice as fast. Both "
    "do the same arithmetic, but for the forward passes of a loop over prompts: where a loop reaches a share of the "
    "machine's GEMM rate, one over that share is the most that a sweep can gain on it."
)

PROMPTS = """Lists of prompts of 8 to 40 random tokens, given as a list (one jagged batch, no padding) and one after
the other. Both were verified to give the same scores before they were timed, in turns."""

SWEEP = """The demo model on random prompts of 5 to 40 tokens. A ratio is the median over the turns of the first way's
time over this one's, in the same turn; of memory it is what is held at the end over what was held early."""

HYBRID = """`python -m bench.speed.hybrid`: tokens through three layers of gated delta rule and one of gated attention,
beside a Llama of the same widths. Rates count the rows' products; the goal is 0.8 of Llama's."""

LOOKING = """`python -m bench.speed.looking`: the price of explaining attention, beside what it is explained of. The
memory is that of the call beside the state that it is given."""
PRODUCTS = """`python -m bench.speed.products`: float32 on a CPU, as torch multiplies and as the engine does, which
takes oneDNN where MKL does not use the CPU's AVX-512. Both take turns. The error is that of the engine's product in
units of torch's."""

SCRIPTS = """Scripts that ask layer by layer, one call per layer, through the published interface. Medians of a way
through all layers, by the clock and of the CPU, which other processes disturb less; ratios are those of single turns.
The floor is the least that products take at the GEMM rate of the same run; the check is what it takes to see, once per
layer, that no weight has changed. A new forward pass begins every way. One by one: nothing is carried ahead."""

SUITE = """`pytest bench --benchmark-only --benchmark-json=bench/results/suite.json`: every backend on every kind of
component, on a random Llama (D = {hidden}, I = {intermediate}, {layers} layers), verified against the reference
backend before they are timed; then capture and readout alone. From a trace to scores at the last position."""


def grouping(result: dict) -> str:
    header = ["layer", "groups", "number of groups", "error", "largest", "Spearman", "top 1 %", "sum"]
    lines = []
    for row in result["rows"]:
        error, largest, rank, top, total = (
            row[name]["median"] for name in ("relative_error", "max_error", "spearman", "top1_overlap", "sum_ratio")
        )
        cells = [f"{error:.3f}", f"{largest:.3f}", f"{rank:.3f}", f"{top:.2f}", f"{total:.2f}×"]
        lines.append([str(row["layer"]), row["grouping"], str(row["groups"]), *cells])
    text = GROUPING.format_map(result["rows"][0])
    return "\n\n".join([heading("Neurons in groups", result["environment"]), text, table(header, lines)])


def prompts(result: dict) -> str:
    header = ["workload", "way", "model", "prompts", "tokens", "prompts/s", "time", "[p20, p80]", "one by one"]
    single = {(r["model"], r["workload"]): r["median_s"] for r in result["rows"] if r["provider"] == "one by one"}
    lines = [
        [
            row["workload"],
            row["provider"],
            row["model"],
            str(row["prompts"]),
            str(row["tokens"]),
            f"{row['prompts_per_s']:.1f}",
            duration(row["median_s"]),
            f"[{duration(row['p20_s'])}, {duration(row['p80_s'])}]",
            f"{single[row['model'], row['workload']] / row['median_s']:.2f}×",
        ]
        for row in result["rows"]
    ]
    return "\n\n".join([heading("Prompts per second", result["environment"]), PROMPTS, table(header, lines)])


def sweep(result: dict) -> str:
    header = ["part", "workload", "way", "prompts", "prompts/s", "memory", "ratio", "goal", "turns"]
    lines = [
        [
            row["part"],
            row["workload"],
            row["provider"],
            f"{row['prompts']:,}",
            "" if row["prompts_per_s"] is None else f"{row['prompts_per_s']:.1f}",
            "" if row["rss"] is None else f"{row['rss'] / 2**20:.0f} MiB",
            "" if row["ratio"] is None else f"{row['ratio']:.3f}×",
            "" if row["ratio"] is None else row["goal"],
            str(row["runs"]),
        ]
        for row in result["rows"]
    ]
    return "\n\n".join([heading("Sweeps", result["environment"]), SWEEP, table(header, lines)])


def products(result: dict) -> str:
    header = ["workload", "model", "as torch", "engine", "ratio", "GFLOP/s, as torch", "engine", "error", "turns"]
    lines = [
        [
            row["workload"],
            row["model"],
            duration(row["torch_s"]),
            duration(row["engine_s"]),
            f"{row['ratio']:.2f}×",
            *(("-", "-") if row["gflops"] is None else (f"{rate:.0f}" for rate in row["gflops"])),
            "-" if row["error"] is None else f"{row['error']:.2f}",
            str(row["runs"]),
        ]
        for row in result["rows"]
    ]
    return "\n\n".join([heading("Products on a CPU", result["environment"]), PRODUCTS, table(header, lines)])


def hybrid(result: dict) -> str:
    header = ["model", "tokens", "hybrid s", "Llama s", "GFLOP/s", "Llama GFLOP/s", "share", "peak MiB", "planned MiB"]
    rows = [
        [
            row["model"],
            str(row["tokens"]),
            f"{row['seconds']:.3f}",
            f"{row['llama_s']:.3f}",
            f"{row['rate'] / 1e9:.0f}",
            f"{row['llama_rate'] / 1e9:.0f}",
            f"{row['share']:.2f}",
            mebibytes(row["peak_bytes"]),
            mebibytes(row["planned_bytes"]),
        ]
        for row in result["rows"]
    ]
    return "\n\n".join([heading("Recurrences beside attention", result["environment"]), HYBRID, table(header, rows, 1)])


def looking(result: dict) -> str:
    header = ["workload", "model", "tokens", "time", "beside", "time", "ratio", "memory", "turns"]
    lines = [
        [
            *(row["workload"], row["model"], str(row["tokens"]), duration(row["seconds"])),
            *(row["beside"], duration(row["beside_s"]), f"{row['ratio']:.2f}×"),
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB",
            str(row["runs"]),
        ]
        for row in result["rows"]
    ]
    return "\n\n".join([heading("Attention's own book", result["environment"]), LOOKING, table(header, lines)])


def scripts(result: dict) -> str:
    header = ["workload", "way", "model", "time", "CPU", "published", "published, CPU", "floor", "check", "turns"]
    lines = [
        [
            row["workload"],
            row["provider"],
            row["model"],
            duration(row["wall_s"]),
            duration(row["cpu_s"]),
            f"{row['wall_ratio']:.2f}×",
            f"{row['cpu_ratio']:.2f}×",
            duration(row["floor_s"]),
            duration(row["check_s"]),
            str(row["runs"]),
        ]
        for row in result["rows"]
    ]
    return "\n\n".join([heading("Layer by layer", result["environment"]), SCRIPTS, table(header, lines)])


def layers(result: dict) -> str:
    header = ["workload", "way", "model", "layers", "from a", "time", "[p20, p80]", "one by one", "of GEMM"]
    lines = [
        [
            row["workload"],
            row["provider"],
            row["model"],
            str(row["layers"]),
            row["source"],
            duration(row["median_s"]),
            f"[{duration(row['p20_s'])}, {duration(row['p80_s'])}]",
            f"{row['ratio']:.2f}×",
            f"{row['gemm_fraction']:.0%}",
        ]
        for row in result["rows"]
    ]
    return "\n\n".join([heading("All layers in one call", result["environment"]), LAYERS, table(header, lines)])


def suite(result: dict) -> str:
    """The file that `--benchmark-json` wrote, with the facts of bench/conftest.py."""
    lines = [
        [
            bench["group"],
            bench["params"]["backend"] if bench["params"] and "backend" in bench["params"] else "-",
            _variant(bench),
            duration(bench["stats"]["median"]),
            f"[{duration(bench['stats']['q1'])}, {duration(bench['stats']['q3'])}]",
            str(bench["stats"]["rounds"]),
        ]
        for bench in result["benchmarks"]
    ]
    header = ["what", "backend", "variant", "median", "[q1, q3]", "rounds"]
    text = SUITE.format_map(result["machine_info"]["shape"])
    return "\n\n".join([heading("Suite", result["machine_info"]["environment"]), text, table(header, lines)])


def _variant(bench: dict) -> str:
    """The parameters besides backend and component kind."""
    known = {name: value for name, value in (bench["params"] or {}).items() if name not in ("backend", "components")}
    return ", ".join(f"{name} {value}" for name, value in known.items()) or "-"
