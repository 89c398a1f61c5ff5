"""Compiles every kernel ahead of time, without a GPU: ``python -m bench.speed.aot [--json] [--quick] [--targets ...]``.

The wrappers of `depass_fast.kernels` and of the fused products are called with tensors that have shapes and no
contents, for the models and decompositions of :func:`launches`. No launch is run; each is compiled for the targets,
with the configuration that the wrapper has computed for such a device. A row per kernel, configuration and target holds
registers, spilled bytes, shared memory, and matrix instructions.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from depass_fast.backends.triton.pieces import make_piece, query_tiles
from depass_fast.kernels import (
    allocation,
    attention,
    completeness,
    crowd,
    few,
    launch,
    linear,
    loudness,
    probabilities,
    rows,
    way_back,
)
from depass_fast.state.layout import Components, Layout

from ..core.cli import command
from ..kernels import fused_products

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "sm_103": (GPUTarget("cuda", 103, 32), 227),
    "sm_120": (GPUTarget("cuda", 120, 32), 99),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 160),
}  # and KiB of shared memory that a program may take
SIBLINGS = ("sm_103", "gfx950")  # of sm_100 and gfx942: compiled for fewer models
FEW, ONE = ("llama-2-7b", "qwen2-7b", "gemma-2-9b"), ("llama-2-7b",)
META = torch.device("meta")
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
         torch.uint8: "u8"}  # fmt: skip


@dataclass(frozen=True)
class Compilation:
    """One compilation: registers and spilled bytes per thread, shared memory per program, matrix instructions.

    ``async_copies`` counts the instructions that copy to shared memory while the program goes on (on NVIDIA).
    """

    kernel: str
    case: str
    target: str
    config: dict
    registers: int | None
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix: tuple[str, ...]
    async_copies: int


# Maps a compilation (the kernel's name, its arguments' types, everything that is constant, the arguments that are
# multiples of 16, and the compiler's options) to the kernel and the first case that needs it.
Launches = dict[tuple, tuple[JITFunction, str]]


@contextmanager
def recorded(found: Launches, case: str) -> Iterator[None]:
    """Record the launches inside instead of running them."""

    def run(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        names = [p.name for p in self.params]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        options = {name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}
        constant = {p.name for p in self.params if p.is_constexpr}
        signature: list[tuple[str, str]] = []
        constants, aligned = [], []
        for place, name in enumerate(names):
            value, special = given[name], not self.params[place].do_not_specialize
            if name in constant or (special and isinstance(value, int) and value == 1):
                signature.append((name, "constexpr"))
                constants.append((name, value))
                continue
            if isinstance(value, Tensor):
                signature.append((name, "*" + TYPES[value.dtype]))
                if special:
                    aligned.append(place)
            elif isinstance(value, int):
                signature.append((name, "i32" if abs(value) < 2**31 else "i64"))
                if special and value % 16 == 0:
                    aligned.append(place)
            else:
                signature.append((name, "fp32"))
        options = tuple(sorted(options.items()))
        compiled = (self.__name__, tuple(signature), tuple(constants), tuple(aligned), options)
        found.setdefault(compiled, (self, case))

    with mock.patch.object(JITFunction, "run", run):
        yield


def launches(chosen: tuple[str, ...] = ()) -> Launches:
    """Every kernel in every configuration that is shipped, for one target's shared memory.

    ``chosen`` are some of the models; of ``ONE`` alone, rules and activations are one, too.
    """
    found: Launches = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        short = TYPES[dtype]
        models = {"llama-2-7b": (4096, 11008, 32, 32, 128)}
        if dtype != torch.float32:
            models |= {"qwen2-7b": (3584, 18944, 28, 4, 128), "gemma-2-9b": (3584, 14336, 16, 8, 256)}
            models |= {"pythia-70m": (512, 2048, 8, 8, 64), "phi-2": (2560, 10240, 32, 32, 80)}
            models |= {"deepseek-v2-lite": (2048, 10944, 16, 16, 192), "llama-3.1-8b": (4096, 14336, 32, 8, 128)}
            models |= {"mistral-7b": (4096, 14336, 32, 8, 128), "gemma-2-27b": (4608, 36864, 32, 16, 128)}
            models |= {"gemma-3-4b": (2560, 10240, 8, 4, 256)}
        for model, shape in ((name, models[name]) for name in chosen or models if name in models):
            _attention(found, f"{model} {short}", dtype, shape)
            every = dtype == torch.bfloat16 and model == "llama-2-7b" and chosen != ONE
            if model in ("llama-2-7b", "qwen2-7b"):
                _mlp(found, f"{model} {short}", dtype, shape, allocation.RULES if every else ("softmax",))
                _sweep(found, f"{model} {short}", dtype, shape)
                _way_back(found, f"{model} {short}", dtype, shape, way_back.CURVES if every else ("silu",))
    return found


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _attention(found: Launches, case: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    """Record the launches of a model's attention, for short prompts and a long one."""
    width, _, heads, kv, head_dim = shape
    many_groups, wide_heads, small_heads = kv < heads // 2, head_dim == 256, head_dim == 64
    groups = heads // kv
    for length in (20, 50, 512) if wide_heads else (20, 512):
        components = Components.tokens(tuple(map(str, range(length))), ("rest",), {0})
        layout = Layout.of((components,), np.array([0, length]))
        tile = launch.mix_tile(length, groups, dtype)
        part = (range(1), 1, 17) if length == 512 else (range(1), 0, None)
        piece = make_piece(layout, *part, tile, groups, META)
        mask: dict[str, Any] = {"softcap": 50.0} if "gemma-2" in case else {}
        mask |= {"window": 4096} if any(name in case for name in ("gemma", "mistral")) else {}
        mask |= {"out_scale": _empty(length)} if "gemma" in case else {}
        mask |= {"key_bias": _empty(length, heads)} if small_heads else {}
        q, k = (_empty(length, h, head_dim, dtype=dtype) for h in (heads, kv))
        frozen = probabilities.Frozen(q, k, 0.1, **mask)
        r, weight = len(piece.rows), None if many_groups else _empty(width, dtype=dtype)
        state, x = _empty(layout.n_rows, width), _empty(r, width, dtype=dtype)
        with recorded(found, f"{case}, N={length}"):
            rows.read_rows(state, piece.rows, _empty(length), weight, small_heads, x)
            hidden, at = _empty(length, width, dtype=dtype), _empty(length, dtype=torch.int64)
            rows.row_scales(hidden, None if length == 20 else at, 1e-5, small_heads)
            tiles = query_tiles(np.array([length]), tile, groups, META)
            lse = probabilities.log_sum_exp(frozen, _empty(length, dtype=torch.int32), tiles, tile)
            value_dim = 128 if head_dim == 192 else head_dim
            values, mixed = (_empty(r, h * value_dim, dtype=dtype) for h in (kv, heads))
            where = (values, piece.keys, piece.items, frozen, lse, tile, length, mixed)
            attention.mix(*where)
            rows.add_rows(state, piece.rows, x)
            starts = _empty(length + 1, dtype=torch.int64)
            if dtype != torch.float16:  # it differs in a load alone
                completeness.missed_norms(state, hidden, completeness.Jagged(starts, at))
                completeness.missed_norms(state[:length], hidden, completeness.Regular(1))
            widest = max(head_dim, value_dim)
            scaled = dtype == torch.float16 and launch.takes_scales(length, widest, groups, dtype, values.device)
            own = _empty(r)
            if scaled:
                rows.read_rows(state, piece.rows, _empty(length), weight, small_heads, x, row_scale=own)
                attention.mix(*where, scales=attention.RowScales(own, own, 1))
                rows.add_rows(state, piece.rows, x, own)
            if length > 64 and dtype.itemsize == 2:
                packed = _empty(length, dtype=torch.int32)
                p = probabilities.stored_probabilities(frozen, lse, packed, tiles, tile, length, dtype)
                attention.mix(*where, probabilities=p)
                if scaled:
                    attention.mix(*where, probabilities=p, scales=attention.RowScales(own, own, 1))


def _mlp(
    found: Launches, case: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int], rules: tuple[str, ...]
) -> None:
    """Record the launches of a model's MLP, for few components and for many; some with a bias and special tokens."""
    width, neurons, heads, kv, _ = shape
    corners = kv < heads // 2
    bias, constant = (1, _empty(neurons)) if corners else (None, None)
    starts, recorded_at = _empty(3, dtype=torch.int64), _empty(2, dtype=torch.int64)
    act = _empty(8, neurons, dtype=dtype)
    for length, name in ((20, "few components"), (512, "some components"), (neurons, "many components")):
        away = _empty(2 * length, dtype=torch.uint8) if corners else None
        scales = _empty(2 * length) if dtype == torch.float16 else None
        segments = allocation.Segments(starts, recorded_at, length, away, bias, 0 if length > 20 else None)
        g, alive = _empty(2 * length, neurons, dtype=dtype), _empty(2 * length, dtype=torch.uint8)
        for rule in rules:
            with recorded(found, f"{case}, {name}, {rule}"):
                allocation.allocate(g, segments, act, rule, 0.1, alive, constant, scales, 0.5)
        with recorded(found, f"{case}, {name}, linear rules"):
            table = _empty(2, neurons)
            linear.share_linearly(g, starts, length, table)
            linear.share_linearly(g, starts, length, table, g, table)
    with recorded(found, case):
        n_tiles = -(-length // fused_products.product_config(dtype, META)["BM"])
        tiles, firsts = _empty(n_tiles, 3, dtype=torch.int32), _empty(3, dtype=torch.int32)
        x, w_gate = _empty(2 * length, width, dtype=dtype), _empty(neurons, width, dtype=dtype)
        state, w_down = _empty(2 * length, width), _empty(width, neurons, dtype=dtype)
        fallback, more = _empty(2 * length), (constant, bias, away)
        log_z = fused_products.gate(x, w_gate, tiles, firsts, starts, 0.1, g, *more)
        fused_products.down(state, g, w_down, act, recorded_at, log_z, tiles, starts, 0.1, fallback, *more)
        rows.read_out(_empty(33, width), _empty(1, width), _empty(33, dtype=torch.int32), _empty(20))


def _sweep(found: Launches, case: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    """Record the launches of an adjoint sweep: starts with few explicit rows, with some, and with many."""
    width, neurons, heads, kv, _ = shape
    starts, queries, constant = 3, 20, _empty(neurons) if kv < heads // 2 else None
    table = _empty(starts, queries, neurons)
    tables = crowd.CrowdTables(table, table, table, _empty(starts, queries))
    act, counts = _empty(queries, neurons, dtype=dtype), _empty(starts, 1).expand(-1, queries)
    first, places = _empty(starts + 1, dtype=torch.int64), _empty(starts, dtype=torch.int32)
    for longest, name in ((3, "few rows"), (20, "some rows"), (131, "many rows")):
        g, alive = _empty(3 * longest, queries, neurons, dtype=dtype), _empty(3 * longest, queries, dtype=torch.uint8)
        with recorded(found, f"{case}, {name}"):
            explicit = crowd.StartRows(first, places, places, longest)
            crowd.share_with_crowds(g, explicit, alive, counts, act, act, 0.1, tables, constant)
    with recorded(found, case):
        offsets = _empty(starts, 1, queries)
        crowd.gradients_of_gates(_empty(starts, 1, queries, neurons, dtype=dtype), act, 0.1, tables, offsets)
        x, y, weight = _empty(starts * queries, width), *(_empty(n, width, dtype=dtype) for n in (starts * queries, 1))
        _few(found, case, dtype, shape)
        loudness.loudest(_empty(9, neurons, dtype=dtype), _empty(queries, 9), _empty(queries), _empty(9))
        rows.add_norm_back(x, y, _empty(queries), weight[0], constant is not None, None if dtype == x.dtype else y)


def _few(found: Launches, case: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    """Record the launches of a sweep's attention, of few positions and of the most that there may be."""
    _, _, heads, kv, head_dim = shape
    sizes = [(20, head_dim), (few.MOST, head_dim)] + [(few.MOST, 4 * few.MOST)] * (heads > kv)
    for positions, columns in sizes:
        p = _empty(kv, heads // kv, positions, positions, dtype=dtype)
        with recorded(found, f"{case}, {positions} positions, {columns} columns"):
            few.apply_few(p, _empty(9, positions, kv * columns, dtype=dtype))
            few.apply_few(p, _empty(9, positions, heads * columns, dtype=dtype), transposed=True)


def _way_back(
    found: Launches, case: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int], curves: tuple[str, ...]
) -> None:
    """Record the launches of a ledger's MLP: gated and not, and of an expert."""
    neurons, positions = shape[1], 20
    y, act = _empty(1, positions, neurons, dtype=dtype), _empty(positions, neurons, dtype=dtype)
    recorded_at, pieces = _empty(positions, dtype=torch.int64), _empty(2, dtype=torch.int32)
    for curve in curves:
        for rule in way_back.RULES:
            with recorded(found, f"{case}, {rule}, {curve}"):
                way_back.neurons_back(y, act, act, act, recorded_at, pieces, rule, curve)
                way_back.neurons_back(y, act, act, None, recorded_at, pieces, rule, curve)
                way_back.neurons_back(y, act, act, act, recorded_at, pieces, rule, curve, _empty(positions))


def compile_for(target: str, quick: bool = False) -> list[Compilation]:
    """Compile all launches for a target; ``quick``: of one model, unless it is Hopper."""
    gpu, kib = TARGETS[target]
    hip = "6" if gpu.backend == "hip" else None
    with (
        mock.patch.object(launch, "shared_memory", lambda device: kib << 10),
        mock.patch.object(torch.version, "hip", hip),
    ):
        found = launches(ONE if quick and target != "sm_90" else FEW if target in SIBLINGS else ())
    return [_compiled(made, function, case, target) for made, (function, case) in found.items()]


def _compiled(made: tuple, function: JITFunction, case: str, target: str) -> Compilation:
    (gpu, kib), (kernel, signature, constants, aligned, options) = TARGETS[target], made
    places = {p.name: (i,) for i, p in enumerate(function.params)}
    attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(function, dict(signature), {places[name]: value for name, value in constants}, attributes)
    compiled = triton.compile(source, target=gpu, options=dict(options))
    registers, spilled = _resources(compiled.asm, gpu)
    code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    matrix = tuple(name for name in ("wgmma", "tcgen05.mma", "mma.sync", "v_mfma") if name in code)
    config = dict(options) | {name: value for name, value in constants if name.isupper()}
    copies, shared = len(re.findall(r"cp\.async\.c[ag]\.|cp\.async\.bulk\.tensor", code)), compiled.metadata.shared
    return Compilation(kernel.strip("_"), case, target, config, registers, spilled, shared, kib << 10, matrix, copies)


def _resources(asm: dict, gpu: GPUTarget) -> tuple[int | None, int]:
    """The registers per thread and the bytes of stack that they are spilled to, read from the binary."""
    if gpu.backend == "hip":
        text = asm["amdgcn"]
        count = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
        return count.get("vgpr_count"), 4 * (count.get("vgpr_spill_count", 0) + count.get("sgpr_spill_count", 0))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(asm["cubin"])
        binary.flush()
        command = [str(_tools(int(gpu.arch)) / "cuobjdump"), "--dump-resource-usage", binary.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", said))
    return int(found["REG"]), int(found["STACK"])


def _tools(arch: int) -> Path:
    """The folder of Triton's assembler: since 3.6 a function of the architecture, before that one for all."""
    from triton.backends.nvidia import compiler

    get_ptxas: Any = compiler.get_ptxas
    tool = get_ptxas(arch) if inspect.signature(get_ptxas).parameters else get_ptxas()
    return Path(tool.path if hasattr(tool, "path") else tool[0]).parent


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.speed.aot", __doc__)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=tuple(TARGETS))
    parser.add_argument("--quick", action="store_true", help="of one model for every target but sm_90")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    with ProcessPoolExecutor(options.jobs) as pool:
        found = [row for part in pool.map(partial(compile_for, quick=options.quick), options.targets) for row in part]
    if options.json:
        print(json.dumps([asdict(row) for row in found], indent=1))
        return
    for row in found:
        print(
            f"{row.target:7} {row.kernel:16} {row.registers or '-':>4} registers {row.spill_bytes:5} B spilled "
            f"{row.shared_bytes / 1024:6.1f} of {row.shared_limit // 1024} KiB  "
            f"{','.join(row.matrix) or '-':12} {row.async_copies:3} async copies  {row.case}"
        )


if __name__ == "__main__":
    main()
