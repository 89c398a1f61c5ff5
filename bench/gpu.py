"""Speed and memory on a GPU: ``python -m bench.gpu --out FILE.json`` (at most 8 minutes), ``--tiny`` anywhere.

First every provider is verified on small models: the library's in every dtype against the reference backend in float64,
torch.compile in the dtype that is timed, the published algorithm in that, too, against itself in float64. Then the
machine's own rates are measured, random models of real shapes are built on the device, in bfloat16, and the providers
timed in turns. ``--tiny`` runs all of it with tiny shapes, on a CPU too, so that a first run on a GPU is a productive
one.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from depass_fast import DePass, Heads, Neurons, Tokens
from depass_fast.backends import backend_status
from depass_fast.backends.torch import mlp
from depass_fast.options import Adjoint
from tests.support.family_models import randomised

from .harness import (
    SHAPES,
    Row,
    Shape,
    build_model,
    environment,
    floor_flops,
    interleaved,
    quantiles,
    random_prompt,
    synchronise,
    write_results,
)
from .kernel_checks import verify as verify_kernels
from .published import Published, groups_for

TARGET = 7
ERRORS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}  # of the largest score, against float64
APPROXIMATE = 0.02  # the same, of adjoint scores
# two heads per key, and seven with biases; norm weights and biases are random
VERIFIED = (
    Shape("verify-512", 512, 1024, 4, 4, 2, vocabulary=512),
    Shape("verify-biases", 896, 1024, 3, 14, 2, vocabulary=512, model_type="qwen2"),
)
VERIFIED_TINY = (
    Shape("verify-tiny", 64, 96, 3, 4, 2, vocabulary=64),
    Shape("verify-tiny-biases", 48, 32, 2, 3, 1, vocabulary=64, model_type="qwen2"),
)


@dataclass(frozen=True)
class Work:
    """``prompts`` prompts of ``length`` tokens, and who is measured on them: by default this library's backends.

    ``components``: tokens, neurons (of layer 0), heads (of all layers), all neurons (of all layers, by the adjoint
    sweep with ``refine`` of them propagated exactly).
    """

    shape: Shape
    components: str
    length: int
    prompts: int = 1
    providers: tuple[str, ...] = ()
    refine: int = 0

    @property
    def name(self) -> str:
        kind = {
            "neurons": "neurons of layer 0",
            "heads": "heads of all layers",
            "all neurons": f"all neurons, adjoint, refine {self.refine:,}",
        }.get(self.components, self.components)
        return f"{kind}, N={self.length}" + (f", {self.prompts} prompts" if self.prompts > 1 else "")

    @property
    def flops(self) -> int:
        if self.components == "all neurons":  # there twice and back once per start layer, twice; refined half-way
            passes = 6 * self.length * self.shape.layers * (self.shape.layers - 1) // 2
            return (passes + self.refine * self.length * self.shape.layers // 2) * self.shape.flops_per_row
        layers = range(self.shape.layers) if self.components == "heads" else [0]
        return self.prompts * sum(floor_flops(self.shape, self.components, self.length, layer) for layer in layers)

    @property
    def groups(self) -> int:
        """Into how many groups the published algorithm must be cut."""
        shape, components = self.shape, self.length if self.components == "tokens" else self.shape.intermediate
        return groups_for(shape.heads, shape.hidden, shape.intermediate, components, self.length, itemsize=2)


def full(shapes: list[str]) -> Iterator[Work]:
    """What says most per second first: the time may be over before the end."""
    first, *_ = every = [SHAPES[name] for name in shapes]
    everyone = ("published", "torch.compile", *backends())
    for shape in every:
        yield Work(shape, "neurons", 20, providers=everyone if shape == first else ())
        yield Work(shape, "tokens", 512)
        yield Work(shape, "tokens", 20, prompts=64)
        yield Work(shape, "heads", 20)
        yield Work(shape, "all neurons", 20, refine=1000)
        yield Work(shape, "tokens", 128, providers=("published", *backends()) if shape == first else ())
        if shape == first:
            yield Work(shape, "tokens", 2048, providers=("triton",))
    yield Work(first, "tokens", 512, providers=("published",))
    for shape in every:
        yield Work(shape, "tokens", 2048, providers=("torch",) if shape == first else ("triton", "torch"))
    yield Work(first, "tokens", 128, providers=("torch.compile",))  # it compiles for minutes


def tiny() -> Iterator[Work]:
    shape = SHAPES["llama-tiny"]
    everyone = ("published", "torch.compile", *backends())
    yield Work(shape, "neurons", 5, providers=everyone)
    yield Work(shape, "all neurons", 5, refine=20)
    yield Work(shape, "tokens", 9, providers=everyone)
    yield Work(shape, "tokens", 4, prompts=3)
    yield Work(shape, "heads", 5)


def provider(name: str, work: Work, model: nn.Module) -> Callable[[], Tensor]:
    """Scores of all components at the last position, forward pass included."""
    device = next(model.parameters()).device
    prompts = [random_prompt(work.shape, work.length, seed).to(device) for seed in range(work.prompts)]
    if name == "published":
        published = Published(model)
        if work.components == "tokens":
            return lambda: published.score(published.tokens(prompts[0], groups=work.groups), -1, TARGET)
        return lambda: published.score(published.neurons(prompts[0], 0, groups=work.groups), -1, TARGET)
    library = DePass(model, backend=name.removesuffix(".compile"))

    def scores() -> Tensor:
        if work.components == "heads":
            return library.attribute(prompts[0], Heads(layers="all"), TARGET).scores
        if work.components == "all neurons":
            options = {"method": Adjoint(refine=work.refine, sample=0)}
            return library.attribute(prompts[0], Neurons(layers="all"), TARGET, **options).scores
        kind = Neurons(0) if work.components == "neurons" else Tokens()
        if work.prompts == 1:
            return library.attribute(prompts[0], kind, TARGET).scores
        return torch.cat([result.scores for result in library.attribute(prompts, kind, TARGET)])

    return compiled(scores) if name == "torch.compile" else scores


def compiled(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The torch backend with its softmax over the components by torch.compile; its products are GEMMs in any case."""
    # without a GPU it is only seen to be traceable
    how = "inductor" if torch.cuda.is_available() else "eager"
    torch.compiler.reset()
    softmax = torch.compile(mlp._softmax_segments, dynamic=True, backend=how)

    def patched() -> Tensor:
        # sizes of 1 are compiled for themselves, of which there are more kinds than the usual limit
        with mock.patch.object(mlp, "_softmax_segments", softmax), torch._dynamo.config.patch(recompile_limit=64):
            return call()

    return patched


def backends() -> list[str]:
    """The library's backends that are worth timing here."""
    return [name for name, reason in backend_status().items() if reason is None and name != "reference"]


def verify(
    device: torch.device, timed: torch.dtype, shapes: tuple[Shape, ...] = VERIFIED, others: Sequence[str] = ()
) -> dict[tuple[str, str, torch.dtype], float]:
    """The largest error of every backend, kind of component and dtype on small models, against float64.

    Of ``others`` (torch.compile, published) in the dtype that is ``timed``.

    Raises:
        RuntimeError: an error is above its limit; nothing is timed then.
    """
    found = [_errors(device, shape) | _errors_of_others(device, shape, timed, others) for shape in shapes]
    keys = {key: None for errors in found for key in errors}  # in order
    return {key: max(errors[key] for errors in found if key in errors) for key in keys}


def _errors_of_others(
    device: torch.device, shape: Shape, dtype: torch.dtype, names: Sequence[str]
) -> dict[tuple[str, str, torch.dtype], float]:
    """Of providers that are no backends; the published algorithm deviates from the method, so it is its own oracle."""
    model, errors = randomised(build_model(shape, dtype, device=device)), {}
    wide = copy.deepcopy(model).double()
    for components in ("tokens", "neurons"):
        work = Work(shape, components, 12)
        for name in names:
            if name == "published" and shape.model_type != "llama":
                continue  # which knows no biases
            oracle = provider(name if name == "published" else "reference", work, wide)()
            errors[name, components, dtype] = _checked(
                shape, name, components, provider(name, work, model)(), oracle, dtype
            )
    return errors


def _checked(
    shape: Shape, name: str, components: str, scores: Tensor, oracle: Tensor, dtype: torch.dtype, least: float = 0.0
) -> float:
    """The error of scores relative to the largest; RuntimeError above the limit of their dtype."""
    error = float((scores - oracle).abs().max() / oracle.abs().max())
    if not error <= max(ERRORS[dtype], least):
        raise RuntimeError(f"{shape.name}, {name}, {components}, {dtype}: off float64 by {error:.2e}.")
    return error


def _errors(device: torch.device, shape: Shape) -> dict[tuple[str, str, torch.dtype], float]:
    errors = {}
    for dtype in ERRORS:
        model = randomised(build_model(shape, dtype, device=device))
        exact = DePass(copy.deepcopy(model).double(), backend="reference")
        for components in ("tokens", "neurons", "heads"):
            work = Work(shape, components, 12)
            kind = {"tokens": Tokens(), "neurons": Neurons(0), "heads": Heads(0)}[components]
            ids = random_prompt(shape, work.length)
            oracle = exact.attribute(ids, kind, TARGET).scores
            for name in backends():
                library = DePass(model, backend=name, compute_dtype=dtype)
                scores = library.attribute(ids, kind, TARGET).scores
                errors[name, components, dtype] = _checked(shape, name, components, scores, oracle, dtype)
        every, ids = Neurons(layers="all"), random_prompt(shape, 12)
        oracle = exact.attribute(ids, every, TARGET, method="exact").scores
        for name in backends():
            library = DePass(model, backend=name, compute_dtype=dtype)
            scores = library.attribute(ids, every, TARGET, method=Adjoint(refine=40, sample=0)).scores
            error = _checked(shape, name, "all neurons", scores, oracle, dtype, least=APPROXIMATE)
            errors[name, "all neurons", dtype] = error
    return errors


def machine(device: torch.device, dtype: torch.dtype, size: int) -> tuple[float, float]:
    """What the machine can do: the rate of a square GEMM in FLOP/s, and the copy bandwidth in bytes/s."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    bulk = torch.empty(size * size * 16, dtype=torch.uint8, device=device)
    other = torch.empty_like(bulk)
    seconds = interleaved({"gemm": lambda: torch.mm(a, b, out=out), "copy": lambda: other.copy_(bulk)}, 20, warmup=5)
    best = {name: quantiles(values)["median_s"] for name, values in seconds.items()}
    return 2 * size**3 / best["gemm"], 2 * bulk.numel() / best["copy"]


def providers_of(work: Work, chosen: list[str]) -> list[str]:
    """Those of a workload's providers that are ``chosen``."""
    return [name for name in work.providers or backends() if name in chosen]


def measure(
    work: Work, model: nn.Module, errors: dict, rate: float, seconds: float, place: dict, chosen: list[str]
) -> list[Row]:
    """A row per provider of those ``chosen``, timed in turns for about ``seconds``.

    Whose first call takes more than twice that is not called again: that call is the row, and the row says so.
    """
    names = providers_of(work, chosen)
    device = next(model.parameters()).device
    calls, peaks, first = {}, {}, {}
    for name in names:
        call = provider(name, work, model)
        try:
            peaks[name], first[name] = _peak(call, device)
        except (torch.OutOfMemoryError, MemoryError):
            print(f"  {work.name}: {name} does not fit", flush=True)
        if name not in first:  # not in the handler: the error holds what its frames held
            torch.cuda.empty_cache()
            continue
        calls[name] = call
    again = {name: call for name, call in calls.items() if first[name] <= 2 * seconds}
    runs = int(min(9, max(1, seconds / max(sum(first[name] for name in again), 1e-9))))
    timed = {name: np.array([value]) for name, value in first.items()} | (
        interleaved(again, runs, warmup=0) if again else {}
    )
    rows = []
    for name, values in timed.items():
        timing = quantiles(values)
        gflops = work.flops / timing["median_s"] / 1e9
        dtype = model.dtype
        rows.append(
            Row(
                workload=work.name,
                model=work.shape.name,
                provider=name + (f" in {work.groups} groups" if name == "published" and work.groups > 1 else ""),
                dtype=str(dtype).removeprefix("torch."),
                **timing,
                gflops=gflops,
                gemm_fraction=gflops * 1e9 / rate,
                gemm_gflops=rate / 1e9,
                peak_bytes=peaks[name],
                max_error=errors.get((name, work.components, dtype)),
                compared_with=f"{'itself' if name == 'published' else 'reference backend'}, float64, on a small model",
                verified=(name, work.components, dtype) in errors,
                first_call=name not in again,
                environment=place,
            )
        )
    return rows


def _peak(call: Callable[[], Tensor], device: torch.device) -> tuple[int | None, float]:
    """Bytes beyond the model that a first call held at most, and its seconds."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    if not bool(torch.isfinite(call()).all()):
        raise RuntimeError("scores hold NaN or inf.")
    if not cuda:
        return None, time.perf_counter() - began
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, time.perf_counter() - began


def profiled(call: Callable[[], Tensor], top: int = 14) -> str:
    """The kernels that take most of the device's time in one call, and their share of the call."""
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        synchronise()
    seconds = time.perf_counter() - began
    events = [e for e in recorded.key_averages() if e.self_device_time_total and e.device_type != DeviceType.CPU]
    events.sort(key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in events) / 1e6
    lines = [f"   {seconds:.3f} s with the profiler, the device busy for {busy:.3f} s"]
    for e in events[:top]:
        lines.append(f"   {e.self_device_time_total / 1e3:9.2f} ms {e.count:6} x  {e.key[:90]}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file, after every workload")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too: checks that it runs")
    parser.add_argument(
        "--models", nargs="+", default=["llama-2-7b", "llama-3.1-8b", "qwen2-7b"], choices=tuple(SHAPES)
    )
    parser.add_argument("--only", help="workloads whose name contains this")
    parser.add_argument("--minutes", type=float, default=7.0, help="no workload is begun after this time")
    parser.add_argument("--seconds", type=float, default=6.0, help="timed per workload, beyond a first call each")
    parser.add_argument("--providers", nargs="+", default=["published", "torch.compile", *backends()], help="who")
    parser.add_argument("--profile", action="store_true", help="print where the device's time goes, per provider")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("bench.gpu: no GPU here. --tiny runs it with tiny shapes on the CPU; bench.cpu is for CPUs.")
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    place = environment(device.type)
    with torch.no_grad():
        for (kernel, kind), error in verify_kernels(device, small=options.tiny).items():
            print(f"verified  {kernel:18} {str(kind).removeprefix('torch.'):9} error {error:.1e}", flush=True)
        others = [name for name in options.providers if name not in backends()]
        errors = verify(device, dtype, VERIFIED_TINY if options.tiny else VERIFIED, others)
        for (name, components, kind), error in errors.items():
            print(f"verified  {name:8} {components:8} {str(kind).removeprefix('torch.'):9} error {error:.1e}")
        rate, bandwidth = machine(device, dtype, 256 if options.tiny else 8192)
        print(
            f"{place['device']}: GEMM {rate / 1e12:.2f} TFLOP/s in {dtype}, copy {bandwidth / 1e9:.0f} GB/s", flush=True
        )
        rows: list[Row] = []
        model, built = None, None
        for work in tiny() if options.tiny else full(options.models):
            if options.only and options.only not in work.name:
                continue
            first_calls = len(providers_of(work, options.providers)) * work.flops / rate  # none is faster
            if (time.monotonic() - began + first_calls) / 60 > options.minutes:
                print(f"{work.shape.name} {work.name}: left out, the time is over", flush=True)
                continue
            if built != work.shape:
                model = None  # before its successor is made
                model, built = build_model(work.shape, dtype, device=device), work.shape
            seconds = 0.0 if options.tiny else options.seconds
            rows += (new := measure(work, model, errors, rate, seconds, place, options.providers))
            if options.profile:
                for name in (n for n in backends() if n in options.providers):
                    print(f"-- {work.name}, {name}\n{profiled(provider(name, work, model))}", flush=True)
            for row in new:
                peak = "" if row.peak_bytes is None else f"  peak {row.peak_bytes / 2**30:6.2f} GiB"
                print(
                    f"{row.model:13} {row.workload:28} {row.provider:24} {row.median_s:9.4f} s "
                    f"[{row.p20_s:.4f}, {row.p80_s:.4f}]  {row.gflops / 1e3:7.2f} TFLOP/s  "
                    f"{row.gemm_fraction:4.0%} of GEMM{peak}",
                    flush=True,
                )
            if options.out:
                machine_rates = {"gemm_tflops": rate / 1e12, "copy_gbytes_per_s": bandwidth / 1e9}
                write_results(options.out, "gpu", rows, quick=options.tiny, machine=machine_rates)


if __name__ == "__main__":
    main()
