"""Verification before anything is timed: every provider on small models against float64."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor

from depass_fast import ComponentKind, DePass, Heads, Neurons, Tokens
from depass_fast.options import Adjoint, BackendName
from depass_fast.trace.consistency import computation
from depass_fast.trace.own_pass import admitted

from ...core.models import Model, Shape, build_model, random_prompt, randomised
from .session import Session
from .workloads import TARGET, Work, backends, provider

ERRORS = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
    torch.float16: 0.05,
}  # relative to the largest score, against float64
APPROXIMATE = 0.02  # the same for adjoint scores
KINDS = ("tokens", "neurons", "heads", "all neurons", "all neurons, taylor")
# two heads per key, and seven with biases; norm weights and biases are random
VERIFIED = (
    Shape("verify-512", 512, 1024, 4, 4, 2, vocabulary=512),
    Shape("verify-biases", 896, 1024, 3, 14, 2, vocabulary=512, model_type="qwen2"),
)
VERIFIED_TINY = (
    Shape("verify-tiny", 64, 96, 3, 4, 2, vocabulary=64),
    Shape("verify-tiny-biases", 48, 32, 2, 3, 1, vocabulary=64, model_type="qwen2"),
)
LENGTH = 12


def verify_backends(session: Session) -> None:
    """Record the largest error of every backend and kind of component, as they are timed, against float64.

    On a GPU every kind has a process of its own, in which its kernels compile.

    Raises:
        RuntimeError: an error is above its limit; names all of them.
    """
    shapes = VERIFIED_TINY if session.tiny else VERIFIED
    tasks = [(shape, kind, session.dtype, str(session.device)) for shape in shapes for kind in KINDS]
    if session.device.type == "cuda":
        with ProcessPoolExecutor(len(tasks), mp_context=multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(_errors, *zip(*tasks, strict=True)))
    else:
        found = [_errors(*task) for task in tasks]
    each = [(*task[:2], *pair) for task, errors in zip(tasks, found, strict=True) for pair in errors.items()]
    _record(session, [(f"{shape.name}, {name}, {kind}", (name, kind), error) for shape, kind, name, error in each])


def verify_precision(session: Session) -> None:
    """Record the errors of the products' dtypes on one trace, ‖scores - exact‖ / ‖exact‖: what the library adds.

    :func:`verify_backends` compares with a forward pass in float64, from which that in half precision is far.
    """
    found = session.sections.setdefault("precision", [])
    kinds: tuple[ComponentKind, ...] = (Tokens(), Heads(0), Neurons(0))
    computes: tuple[str | None, ...] = ("float32", "float16") if session.tiny else ("bfloat16", None)
    for shape in VERIFIED_TINY if session.tiny else VERIFIED:
        library = DePass(_models(shape, session.dtype, session.device)[0])
        trace = library.trace(random_prompt(shape, LENGTH).to(session.device))
        for kind in kinds:
            exact = library.attribute(trace, kind, TARGET, backend="reference", state_dtype="float64").scores.double()
            for name in cast(tuple[BackendName, ...], backends()):
                for compute in computes:
                    scores = library.attribute(trace, kind, TARGET, backend=name, compute_dtype=compute).scores
                    error = float((scores - exact).norm() / exact.norm())
                    about = (shape.name, kind.kind, name, compute or "default")
                    names = ("model", "components", "backend", "products")
                    found.append({**dict(zip(names, about, strict=True)), "error": error})
                    session.say(f"{', '.join(about)}: error {error:.1e}")


def verify_forward(session: Session) -> None:
    """Record whether our forward pass agrees with the models' own on this device, so that it is what is timed."""
    found = session.sections.setdefault("forward", [])
    for shape in VERIFIED_TINY if session.tiny else VERIFIED:
        library = DePass(_models(shape, session.dtype, session.device)[0])
        library.trace(random_prompt(shape, LENGTH).to(session.device))
        ours = admitted(library.adapter, computation(library.model)) is not None
        found.append({"model": shape.name, "ours": ours})
        whose = "ours" if ours else "NOT OURS"
        session.say(f"{shape.name}: the forward pass from the second call on is {whose}")


def verify_others(session: Session, names: Sequence[str]) -> None:
    """The same for providers that are no backends. The published algorithm, which deviates, is its own oracle."""
    found = []
    for shape in VERIFIED_TINY if session.tiny else VERIFIED:
        model, wide = _models(shape, session.dtype, session.device)
        for components in ("tokens", "neurons"):
            work = Work(shape, components, LENGTH)
            for name in names:
                if name == "published" and shape.model_type != "llama":
                    continue  # it knows no biases
                oracle = provider(name if name == "published" else "reference", work, wide)()
                error = _relative(provider(name, work, model)(), oracle)
                found.append((f"{shape.name}, {name}, {components}", (name, components), error))
    _record(session, found)


def _record(session: Session, found: Sequence[tuple[str, tuple[str, str], float]]) -> None:
    """Keep the errors of providers that pass on every model."""
    wrong, worst = [], {}
    for place, (name, kind), error in found:
        worst[name, kind] = max(error, worst.get((name, kind), 0.0))
        limit = max(ERRORS[session.dtype], APPROXIMATE if kind.startswith("all") else 0.0)
        if not error <= limit:
            wrong.append(f"{place}: off float64 by {error:.2e}, limit {limit:g}")
            worst[name, kind] = float("inf")
    for (name, kind), error in worst.items():
        good = error < float("inf")
        session.say(f"{'verified' if good else 'WRONG'} {name:13} {kind:20} error {error:.1e}")
        if good:
            session.errors[name, kind, session.dtype] = error
    if wrong:
        raise RuntimeError("; ".join(wrong))


def _models(shape: Shape, dtype: torch.dtype, device: torch.device | str) -> tuple[Model, Model]:
    """A model and the same in float64."""
    model = randomised(build_model(shape, dtype, device=device)).requires_grad_(False)
    return model, copy.deepcopy(model).double()


@torch.no_grad()
def _errors(shape: Shape, kind: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    """The errors of every backend on one kind of component."""
    model, wide = _models(shape, dtype, device)
    components = {"tokens": Tokens(), "neurons": Neurons(0), "heads": Heads(0)}.get(kind, Neurons(layers="all"))
    ids, rule = random_prompt(shape, LENGTH), "taylor" if kind.endswith("taylor") else "softmax"
    given: dict[str, Any] = {"allocation": rule}
    oracle = DePass(wide, backend="reference").attribute(ids, components, TARGET, method="exact", **given).scores
    if kind.startswith("all"):
        given["method"] = Adjoint(refine=40, sample=0) if rule == "softmax" else "adjoint"
    return {
        name: _relative(
            DePass(model, backend=cast(BackendName, name)).attribute(ids, components, TARGET, **given).scores, oracle
        )
        for name in backends()
    }


def _relative(scores: Tensor, oracle: Tensor) -> float:
    """The largest difference, relative to the largest score; NaN counts as inf."""
    scores, oracle = scores.double().cpu(), oracle.double().cpu()
    error = (scores - oracle).abs().max() / oracle.abs().max()
    return float(torch.nan_to_num(error, nan=float("inf")))
