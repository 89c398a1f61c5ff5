"""The machine: its clocks as they are found, the rate of copies, and of products in the shapes that a layer has."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from depass_fast.runtime.precision import full_precision
from depass_fast.runtime.products import accumulate

from ...core.models import Shape
from ...core.timing import Timing, quantiles
from ...kernels.split_products import split, split_product
from .events import seconds_of

CLOCKS = ("name", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "power.limit",
          "driver_version")  # fmt: skip
BUDGET = 1 << 30  # bytes of workspace on a GPU, which decide the rows of a production chunk


def clocks() -> dict[str, str]:
    """Clocks, temperature and power as nvidia-smi reads them; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return dict(zip(CLOCKS, (value.strip() for value in said.splitlines()[0].split(",")), strict=False))


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes/s of a copy on the device, read and written bytes counted."""
    bulk = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    other = torch.empty_like(bulk)
    return 2 * size / quantiles(seconds_of(lambda: other.copy_(bulk), device, runs=10))["median_s"]


def square_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / quantiles(seconds_of(lambda: torch.mm(a, b, out=out), device, runs=15))["median_s"]


def float32_rates(device: torch.device, m: int, k: int, n: int) -> dict[str, float]:
    """A product of float32 matrices (m, k) x (k, n) by the library's GEMM and as three in float16: TFLOP/s, and errors.

    The rows are split each time, the weight is split before; its splitting stands apart, in seconds.
    """
    x, w = torch.randn(m, k, device=device), torch.randn(n, k, device=device).mul_(0.02)
    out = torch.empty(m, n, device=device)
    parts, few = split(w), slice(0, min(m, 256))
    exact = x[few].double() @ w.double().T
    found: dict[str, float] = {}
    for name, call in (
        ("gemm", lambda: torch.mm(x, w.T, out=out)),
        ("split", lambda: split_product(split(x), parts, out)),
    ):
        with full_precision():
            seconds = quantiles(seconds_of(call, device, runs=5))["median_s"]
        found[f"{name}_tflops"] = 2 * m * k * n / seconds / 1e12
        found[f"{name}_error"] = float((out[few] - exact).norm() / exact.norm())
    found["split_weight_s"] = quantiles(seconds_of(lambda: split(w), device, runs=5))["median_s"]
    return found


@dataclass(frozen=True)
class Gemm:
    """One product of a layer, (M, K) x (K, N), as the backends call it: O and down are added to the float32 state."""

    model: str
    product: str
    dtype: str
    m: int
    k: int
    n: int
    timing: Timing

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n

    @property
    def rate(self) -> float:
        return self.flops / self.timing["median_s"]

    def as_dict(self) -> dict:
        fields = asdict(self)
        return {**fields, **fields.pop("timing"), "tflops": self.rate / 1e12}


@dataclass(frozen=True)
class GemmRates:
    """A layer's products in every half precision."""

    gemms: tuple[Gemm, ...]

    def rate(self, dtype: str, *products: str) -> float:
        """FLOP/s of these products (default: all) in a dtype, weighted by their FLOP."""
        chosen = [g for g in self.gemms if g.dtype == dtype and (not products or g.product in products)]
        return sum(g.flops for g in chosen) / sum(g.timing["median_s"] for g in chosen)

    @property
    def best(self) -> float:
        """FLOP/s in the faster of the dtypes: no provider is measured by the slower one."""
        return max(self.rate(dtype) for dtype in dict.fromkeys(g.dtype for g in self.gemms))

    def as_dicts(self) -> list[dict]:
        return [gemm.as_dict() for gemm in self.gemms]

    def __str__(self) -> str:
        said = []
        for dtype in dict.fromkeys(g.dtype for g in self.gemms):
            each = [f"{g.product} {g.rate / 1e12:.1f}" for g in self.gemms if g.dtype == dtype]
            said.append(f"{dtype} {', '.join(each)}, together {self.rate(dtype) / 1e12:.1f}")
        first = self.gemms[0]
        return f"{first.model} GEMMs of {first.m:,} rows, TFLOP/s: {'; '.join(said)}"


def chunk_rows(shape: Shape, itemsize: int = 2, budget: int = BUDGET) -> int:
    """The rows of a chunk that carries the neurons of one layer: whole positions within the workspace."""
    position = shape.intermediate + 1
    most = budget // ((shape.hidden + shape.intermediate) * itemsize)
    return max(1, most // position) * position


def gemm_rates(shape: Shape, device: torch.device, tiny: bool) -> GemmRates:
    """Measure V, O, gate and down with the rows of a production chunk."""
    rows = 64 if tiny else chunk_rows(shape)
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float16)
    found = []
    for dtype in dtypes:
        for product, (k, n, call) in _products(shape, rows, dtype, device).items():
            timing = quantiles(seconds_of(call, device, runs=3 if tiny else 12))
            found.append(Gemm(shape.name, product, str(dtype).removeprefix("torch."), rows, k, n, timing))
    return GemmRates(tuple(found))


def _products(
    shape: Shape, rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[int, int, Callable[[], object]]]:
    """The products by name: K, N and the call. A down product adds shares, which are small, to the state."""
    width, neurons = shape.hidden, shape.intermediate
    v, o = shape.head_dim * shape.kv_heads, shape.head_dim * shape.heads

    def matrix(n: int, m: int, size: float = 1.0) -> torch.Tensor:
        return torch.randn(n, m, device=device, dtype=dtype).mul_(size)

    x, values = matrix(rows, width), torch.empty(rows, v, device=device, dtype=dtype)
    mixed, state = matrix(rows, o), torch.zeros(rows, width, device=device)
    gates = torch.empty(rows, neurons, device=device, dtype=dtype)
    shares = matrix(rows, neurons, 0.01)
    w_v, w_o = matrix(v, width, 0.02), matrix(width, o, 0.02)
    w_gate, w_down = matrix(neurons, width, 0.02), matrix(width, neurons, 0.02)
    return {
        "V": (width, v, lambda: torch.mm(x, w_v.T, out=values)),
        "O": (o, width, lambda: accumulate(state, mixed, w_o.T)),
        "gate": (width, neurons, lambda: torch.mm(x, w_gate.T, out=gates)),
        "down": (neurons, width, lambda: accumulate(state, shares, w_down.T)),
    }
