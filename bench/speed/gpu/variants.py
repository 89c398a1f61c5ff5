"""Variants of the library beside each other, in one session and in turns: the table, and how it is measured.

A comparison is a workload and named setups. A setup holds options of DePass and attributes that are replaced while it
runs, for example ``("depass_fast.backends.active", "make_groups", ...)``: a switch of the code needs no argument of its
own to be measured.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from torch import Tensor

from depass_fast.kernels.launch import allocation_config

from ...core.models import SHAPES, Model
from ...core.timing import interleaved, quantiles
from .session import Session
from .workloads import Setup, Work, fastest, provider

GIB = 1 << 30


@dataclass(frozen=True)
class Comparison:
    """Setups by name, measured on one workload."""

    name: str
    work: Work
    setups: dict[str, Setup]


def switched(place: str, attribute: str, value: Any, **options: Any) -> Setup:
    """One attribute of a module, or of a class in it, replaced."""
    return Setup(options, ((place, attribute, value),))


ARENA = "depass_fast.backends.triton.arena"


def comparisons(shape_name: str, tiny: bool) -> Iterator[Comparison]:
    """The table. Layers beyond the first eight repeat them: a comparison needs no whole model."""
    shape = SHAPES[shape_name]
    shape = replace(shape, layers=min(8, shape.layers), vocabulary=1024)
    neurons = Work(shape, "neurons", 5 if tiny else 20)
    tokens = Work(shape, "tokens", 9 if tiny else 512)
    kind = "float32" if tiny else "bfloat16"
    dtypes = {f"products in {kind}": Setup({"compute_dtype": kind}), "products by default": Setup()}
    plain = allocation_config
    shapes = {
        "in one stage": lambda *at: plain(*at) | {"STAGES": 1},
        "by default": plain,
        "16 x 128 in 4 stages": lambda *at: plain(*at) | {"BM": 16, "BI": 128, "STAGES": 4, "num_warps": 8},
    }
    allocate = {n: switched("depass_fast.kernels.allocation", "allocation_config", how) for n, how in shapes.items()}
    budgets = {f"{n} GiB": Setup({"memory_budget": n * GIB}) for n in (1, 4, 8)}
    stored = {"P made again": switched(f"{ARENA}.Arena", "stores", lambda self, *_: False), "P stored": Setup()}
    yield Comparison("neurons: allocate", neurons, allocate)
    for work in (neurons,) if tiny else (neurons, tokens):
        yield Comparison(f"{work.components}: products", work, dtypes)
        yield Comparison(f"{work.components}: budgets", work, budgets)
    yield Comparison("tokens: probabilities", tokens, stored)
    passes = {"the model's": switched("depass_fast.trace.own_pass", "admitted", lambda *_: None), "ours": Setup()}
    for work in (Work(shape, "heads", 20), Work(shape, "tokens", 20, prompts=2 if tiny else 64)):
        yield Comparison(f"{work.components}: forward pass", work, passes)
    if not tiny:
        dense = {
            "all neurons": switched("depass_fast.backends.active", "make_groups", lambda *_: None),
            "active ones": Setup(),
        }
        yield Comparison("ReLU: zeros", Work(SHAPES["opt-6.7b"], "neurons", 20), dense)


def place_of(path: str) -> Any:
    """The module or class of a dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def missing(setup: Setup) -> str | None:
    """The first switch that the library does not have."""
    for path, attribute, _ in setup.patches:
        if not hasattr(place_of(path), attribute):
            return f"{path}.{attribute}"
    return None


@contextmanager
def in_place(setup: Setup) -> Iterator[None]:
    """The setup's attributes replaced."""
    with ExitStack() as undo:
        for path, attribute, value in setup.patches:
            undo.enter_context(mock.patch.object(place_of(path), attribute, value))
        yield


def compare(session: Session, comparison: Comparison) -> None:
    """Time the setups in turns and record the figures of each, first calls apart."""
    work, model = comparison.work, session.model(comparison.work.shape)
    rate = session.rates(work.shape).best
    calls: dict[str, Callable[[], Tensor]] = {}
    rows = session.sections.setdefault("variants", [])
    for name, setup in comparison.setups.items():
        if gone := missing(setup):
            rows.append({"comparison": comparison.name, "variant": name, "left_out": f"there is no {gone}"})
            session.say(f"{comparison.name}, {name}: left out, there is no {gone}")
            continue
        calls[name] = _call(work, model, setup)
    if not calls:
        return
    first = interleaved(calls, 1, warmup=0)
    for name, values in interleaved(calls, 1 if session.tiny else 3, warmup=0).items():
        timing = quantiles(values)
        flops = work.flops / timing["median_s"]
        row = {
            "comparison": comparison.name,
            "variant": name,
            "model": work.shape.name,
            "workload": work.name,
            **timing,
            "first_call_s": float(first[name][0]),
            "tflops": flops / 1e12,
            "gemm_fraction": flops / rate,
        }
        rows.append(row)
        session.say(
            f"{comparison.name}, {name:24} {timing['median_s']:.4f} s "
            f"[{timing['p20_s']:.4f}, {timing['p80_s']:.4f}]  {row['gemm_fraction']:.1%} of GEMM"
        )
    session.write()


def _call(work: Work, model: Model, setup: Setup) -> Callable[[], Tensor]:
    with in_place(setup):
        inner = provider(fastest(), work, model, setup)

    def call() -> Tensor:
        with in_place(setup):
            return inner()

    return call
