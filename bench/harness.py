"""Shared tools of the benchmarks: models, floors, rows, interleaved timing, the machine's own GEMM rate.

**Floor** (DESIGN.md section 5). One row (a component at a position) through one layer costs
``2·D·(d_kv + H·d) + 4·D·I`` FLOP: V and O, then gate and down. Counted are the rows that can be non-zero, in the layers
that they pass; in the last layer only those at the position that is read. Multiplying by the attention probabilities
is not counted, nor is the forward pass. All providers' rates are *useful* rates: this same floor over their time.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig


@dataclass(frozen=True)
class Shape:
    """A Llama, or another family of that layout, with random weights."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 1024
    model_type: str = "llama"

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def flops_per_row(self) -> int:
        """FLOP of one row through one layer."""
        width = self.head_dim * (self.kv_heads + self.heads)
        return 2 * self.hidden * width + 4 * self.hidden * self.intermediate


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-512", 512, 1408, 6, 8, 8),  # small, for a CPU
        Shape("llama-tiny", 64, 96, 3, 4, 2, vocabulary=64),
        Shape("llama-2-7b", 4096, 11008, 32, 32, 32, vocabulary=32000),
        Shape("llama-3.1-8b", 4096, 14336, 32, 32, 8, vocabulary=128256),
        Shape("qwen2-7b", 3584, 18944, 28, 28, 4, vocabulary=152064, model_type="qwen2"),
        Shape("pythia-6.9b", 4096, 16384, 32, 32, 32, vocabulary=50432, model_type="gpt_neox"),
        Shape("gemma-2-9b", 3584, 14336, 42, 16, 8, vocabulary=256000, model_type="gemma2"),
    )
}


def config_of(shape: Shape) -> PretrainedConfig:
    """The config of a model of this shape."""
    return AutoConfig.for_model(
        shape.model_type,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def build_model(
    shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0, device: str | torch.device = "cpu"
) -> nn.Module:
    """A random model of this shape, with eager attention (the published implementation needs it)."""
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made in place: a 7B model in float32 would take its memory twice over
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config_of(shape), attn_implementation="eager").to(dtype).eval()
    finally:
        torch.set_default_dtype(usual)


def random_prompt(shape: Shape, length: int, seed: int = 1) -> torch.Tensor:
    """Random ids (N,)."""
    return torch.randint(0, shape.vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


def live_rows(shape: Shape, components: str, length: int, layer: int = 0) -> tuple[int, int, int]:
    """Rows in a full layer, rows in the last layer (read at the last position), and how many layers are passed."""
    if components == "tokens":
        return length * (length + 1) // 2, length, shape.layers - layer
    count = {"neurons": shape.intermediate, "heads": shape.heads}[components] + 1  # rest
    return length * count, count, shape.layers - layer - (components == "neurons")


def floor_flops(shape: Shape, components: str, length: int, layer: int = 0) -> int:
    """The floor of one attribution at the last position, in FLOP (see the module)."""
    rows, last, layers = live_rows(shape, components, length, layer)
    if not layers:
        return 0
    # heads start after their layer's attention
    skipped = rows * (shape.flops_per_row - 4 * shape.hidden * shape.intermediate) if components == "heads" else 0
    return ((layers - 1) * rows + last) * shape.flops_per_row - (skipped if layers > 1 else 0)


# -- rows -----------------------------------------------------------------------------------------------------------


class Fact(Protocol):
    """What a result file holds many of."""

    def as_dict(self) -> dict: ...


@dataclass
class Row:
    """One measured fact. Times in seconds, memory in bytes; ``max_error`` is relative to the largest score."""

    workload: str
    model: str
    provider: str
    dtype: str
    median_s: float
    p20_s: float
    p80_s: float
    runs: int
    gflops: float | None  # useful: the floor over the median
    gemm_fraction: float | None  # of `gemm_gflops`
    gemm_gflops: float | None  # the machine's rate, measured in the same run
    peak_bytes: int | None
    max_error: float | None
    compared_with: str
    verified: bool
    first_call: bool = False  # it was too slow to be called again: compilation and first allocations are in it
    environment: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        tflops = None if self.gflops is None else self.gflops / 1e3
        return {**asdict(self), "tflops": tflops, "device": self.environment.get("device")}


def environment(device: str = "cpu") -> dict:
    """Where a row was measured: device, versions, commit, threads."""
    return {
        "device": _cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def write_results(path: Path, benchmark: str, rows: Sequence[Fact], device: str | None = None, **more: object) -> None:
    """A result file: where it was measured, the rows, and ``more``. What :mod:`bench.report` reads.

    ``device``: default the GPU where there is one, but for `cpu`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if device is None:
        device = "cpu" if benchmark == "cpu" or not torch.cuda.is_available() else "cuda"
    place = environment(torch.device(device).type)
    content = {"benchmark": benchmark, "environment": place, **more, "rows": [row.as_dict() for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit that is measured; "+" where the working tree differs from it."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# -- timing ---------------------------------------------------------------------------------------------------------


def interleaved(candidates: dict[str, Callable[[], object]], runs: int, warmup: int = 1) -> dict[str, np.ndarray]:
    """Seconds of every candidate, ``runs`` each, round-robin: what disturbs the machine disturbs all of them."""
    for _ in range(warmup):
        for candidate in candidates.values():
            candidate()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(runs):
        names = list(candidates)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(_timed(candidates[name]))
    return {name: np.array(values) for name, values in seconds.items()}


def _timed(candidate: Callable[[], object]) -> float:
    synchronise()
    began = time.perf_counter()
    candidate()
    synchronise()
    return time.perf_counter() - began


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quantiles(seconds: np.ndarray) -> dict[str, float]:
    """Median, p20 and p80, as a row names them."""
    low, middle, high = np.quantile(seconds, [0.2, 0.5, 0.8])
    return {"median_s": float(middle), "p20_s": float(low), "p80_s": float(high), "runs": len(seconds)}


class Gemm:
    """The two MLP products, (rows, D) x (D, I) and (rows, I) x (I, D), on their own: what the machine can do.

    Outputs are preallocated and weights lie as a model holds them. ``rows`` is the fastest of several sizes up to the
    workload's, tried when it is made.
    """

    SIZES = (512, 1024, 2048, 4096, 8192)

    def __init__(self, shape: Shape, rows: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        make = torch.Generator().manual_seed(0)

        def matrix(n: int, m: int) -> torch.Tensor:
            return torch.randn(n, m, generator=make).to(device, dtype)

        self.shape = shape
        self.w_gate, self.w_down = matrix(shape.intermediate, shape.hidden), matrix(shape.hidden, shape.intermediate)
        sizes = [size for size in self.SIZES if size <= rows] or [rows]
        self.x, self.g = matrix(max(sizes), shape.hidden), matrix(max(sizes), shape.intermediate)
        self.rows = max(sizes)
        self.repeats = 1
        rates = {}
        for size in sizes:
            self._resize(size)
            rates[size] = self.rate(interleaved({"gemm": self}, runs=5)["gemm"])
        self._resize(max(rates, key=rates.__getitem__))

    def _resize(self, rows: int) -> None:
        self.rows, self.repeats = rows, max(1, self.SIZES[-1] // rows)
        self.up = self.x.new_empty(rows, self.shape.intermediate)
        self.down = self.x.new_empty(rows, self.shape.hidden)

    def __call__(self) -> None:
        for _ in range(self.repeats):
            torch.mm(self.x[: self.rows], self.w_gate.T, out=self.up)
            torch.mm(self.g[: self.rows], self.w_down.T, out=self.down)

    def rate(self, seconds: np.ndarray) -> float:
        """GFLOP/s at the median."""
        flops = self.repeats * self.rows * 4 * self.shape.hidden * self.shape.intermediate
        return flops / float(np.median(seconds)) / 1e9
