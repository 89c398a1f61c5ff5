"""Verification before anything is timed: every provider on small models against float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from depass_fast import DePass, Heads, Neurons, Tokens
from depass_fast.options import Adjoint

from ...core.models import Shape, build_model, random_prompt, randomised
from .workloads import TARGET, Work, backends, provider

Errors = dict[tuple[str, str, torch.dtype], float]  # of a provider, a kind of component and a dtype

ERRORS = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
    torch.float16: 0.05,
}  # relative to the largest score, against float64
APPROXIMATE = 0.02  # the same for adjoint scores
# two heads per key, and seven with biases; norm weights and biases are random
VERIFIED = (
    Shape("verify-512", 512, 1024, 4, 4, 2, vocabulary=512),
    Shape("verify-biases", 896, 1024, 3, 14, 2, vocabulary=512, model_type="qwen2"),
)
VERIFIED_TINY = (
    Shape("verify-tiny", 64, 96, 3, 4, 2, vocabulary=64),
    Shape("verify-tiny-biases", 48, 32, 2, 3, 1, vocabulary=64, model_type="qwen2"),
)


def verify(
    device: torch.device, timed: torch.dtype, shapes: tuple[Shape, ...] = VERIFIED, others: Sequence[str] = ()
) -> Errors:
    """The largest error of every backend, kind of component and dtype on small models, against float64.

    ``others`` (torch.compile, published) are verified in the dtype that is ``timed``.

    Raises:
        RuntimeError: an error is above its limit; nothing is timed then.
    """
    found = [_errors(device, shape) | _errors_of_others(device, shape, timed, others) for shape in shapes]
    keys = dict.fromkeys(key for errors in found for key in errors)  # in order
    return {key: max(errors[key] for errors in found if key in errors) for key in keys}


def _errors_of_others(device: torch.device, shape: Shape, dtype: torch.dtype, names: Sequence[str]) -> Errors:
    """The errors of providers that are no backends. The published algorithm, which deviates, is its own oracle."""
    model, errors = randomised(build_model(shape, dtype, device=device)), {}
    wide = copy.deepcopy(model).double()
    for components in ("tokens", "neurons"):
        work = Work(shape, components, 12)
        for name in names:
            if name == "published" and shape.model_type != "llama":
                continue  # it knows no biases
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


def _errors(device: torch.device, shape: Shape) -> Errors:
    """The errors of every backend."""
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
