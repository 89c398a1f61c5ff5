"""``depass-fast attribute``: from its arguments to what it prints. What is heavy is imported inside the functions."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import types as cli_types

if TYPE_CHECKING:
    from ..components.base import ComponentKind
    from ..engine import DePass
    from ..results.attribution import Attribution
    from ..results.layered import LayeredAttribution

SUFFIXES = (".safetensors", ".csv")


def attribute(args: argparse.Namespace) -> None:
    # stdout belongs to the result: whatever a library prints on the way goes to stderr.
    with contextlib.redirect_stdout(sys.stderr), _telling():
        result = _result(args)
        if args.out is not None:
            (result.save if args.out.suffix == ".safetensors" else result.to_csv)(args.out)
    if args.json:
        print(json.dumps(result.to_dict(), allow_nan=False))
    else:
        _show(result, args.top)
    if args.out is not None:
        print(f"wrote {args.out}", file=sys.stderr)


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """What the library logs (which backend was chosen, and why) goes to stderr."""
    logger, handler = logging.getLogger("depass_fast"), logging.StreamHandler(sys.stderr)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _result(args: argparse.Namespace) -> Attribution | LayeredAttribution:
    """The attribution that was asked for; everything that can be checked before loading the model is."""
    check_out(args.out, SUFFIXES, "--out")
    prompt = _prompt(args)
    if (args.contrast is not None or args.contrast_id is not None) and args.target is None and args.target_id is None:
        raise ValueError("--contrast: needs a target to be contrasted with; give --target or --target-id.")
    check_model(args.model)
    quiet()
    import torch

    from ..allocation import Allocation
    from ..backends import choose_backend
    from ..options import Options

    Allocation(args.allocation, args.temperature)
    device = device_of(args.device)
    where, dtype = torch.device(device), getattr(torch, args.dtype) if args.dtype else None
    choose_backend(args.backend, where, dtype and Options().dtypes(dtype, where)[1])
    kind = kind_of(args)
    engine = _load(args, device)
    method = cli_types.method_of(args)
    with warnings.catch_warnings():
        from ..adjoint.estimate import ApproximationWarning
        from ..results.verification import VerificationWarning

        for said in (ApproximationWarning, VerificationWarning):  # what is printed says so itself
            warnings.simplefilter("ignore", said)
        return engine.attribute(prompt, kind, _target(args, engine), position=args.position, method=method)


def _prompt(args: argparse.Namespace) -> str | list[int]:
    if args.prompt is not None:
        if not args.prompt:
            raise ValueError("--prompt: empty; at least one token is needed.")
        return args.prompt
    ids = args.input_ids.replace(",", " ").split()
    for item in ids:
        if not item.isdecimal():
            raise ValueError(f'--input-ids: {item!r} is not a token id; expected integers such as "1 5 9".')
    if not ids:
        raise ValueError('--input-ids: empty; expected integers such as "1 5 9".')
    return [int(item) for item in ids]


def check_out(path: Path | None, suffixes: Sequence[str], flag: str) -> None:
    if path is None:
        return
    if path.suffix not in suffixes:
        raise ValueError(f"{flag}: {str(path)!r} must end in {' or '.join(suffixes)}.")
    if path.is_dir() or not path.parent.is_dir():
        wrong = "is a folder" if path.is_dir() else f"lies in a folder that does not exist: {path.parent}"
        raise ValueError(f"{flag}: {str(path)!r} {wrong}.")


def check_model(model: str) -> None:
    path = Path(model).expanduser()
    if model == "demo" or (path.is_dir() and (path / "config.json").is_file()):
        return
    if path.exists():
        raise ValueError(f"--model: {model!r} is no model folder: it holds no config.json.")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        raise ValueError(f"--model: there is no folder {model!r}. Give a model folder, a hub name, or demo.")


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def device_of(name: str | None, elsewhere: bool = False) -> str:
    """The device of that name, or the best there is. With ``elsewhere`` another machine's will do, for a plan."""
    import torch

    here = ["cpu"]
    if torch.cuda.is_available():
        here += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        here.append("mps")
    if name is None:
        return "cuda" if "cuda" in here else "cpu"
    if name not in here and not (elsewhere and name in ("cuda", "mps")):
        raise ValueError(f"--device: {name!r} does not exist here; devices: {', '.join(here)}.")
    return name


def config_of(model: str) -> Any:
    """The config of a model, and nothing else of it."""
    from transformers import AutoConfig

    path = path_of(model)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        where = "" if Path(path).is_dir() else f"{model!r} is no folder here, and the hub did not give it: "
        raise ValueError(f"--model: {where}{one_line(error)}") from error


def kind_of(args: argparse.Namespace) -> ComponentKind:
    """The component kind. The layer is checked against the model's config, before any weight is read."""
    from ..components import model as components

    config = config_of(args.model)
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    layers = "its layers" if n_layers is None else f"0 to {n_layers - 1}"
    if args.layer is None and args.components != "tokens":
        raise ValueError(f"--layer: {args.components} belong to a layer; choose one of {layers}.")
    if args.layer == "all":
        if args.components == "tokens":
            raise ValueError(f"--layer: tokens enter at one layer; choose one of {layers}.")
        return getattr(components, args.components.capitalize())(layers="all")
    kind = getattr(components, args.components.capitalize())(0 if args.layer is None else args.layer)
    if n_layers is not None and not -n_layers <= kind.layer < n_layers:
        raise ValueError(f"--layer: {kind.layer} is out of range; this model has layers {layers}.")
    return kind


def _load(args: argparse.Namespace, device: str) -> DePass:
    from ..engine import DePass

    options = {
        "allocation": args.allocation,
        "temperature": args.temperature,
        "exclude_special": not args.no_exclude_special,
        "backend": args.backend,
        "memory_budget": args.memory_budget,
        "progress": not args.quiet,
        "verify": args.verify,
    }
    if args.model == "demo":
        import torch

        from ..demo import load_demo

        model, tokenizer = load_demo(getattr(torch, args.dtype) if args.dtype else None)
        engine = DePass(model.to(device), tokenizer, **options)
    else:
        engine = DePass.from_pretrained(path_of(args.model), dtype=args.dtype or "auto", device_map=device, **options)
    if engine.tokenizer is None:
        for flag, ids in (("prompt", "input-ids"), ("target", "target-id"), ("contrast", "contrast-id")):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag}: text needs a tokenizer, and {args.model!r} has none; give --{ids}.")
    return engine


def path_of(model: str) -> str:
    """Where a model is: the demo model's folder, or what was given."""
    from ..demo import demo_path

    return str(demo_path() if model == "demo" else Path(model).expanduser())


def _target(args: argparse.Namespace, engine: DePass) -> Any:
    from ..inputs.prompts import single_token

    target = args.target if args.target is not None else args.target_id
    contrast = args.contrast_id
    if args.contrast is not None:
        contrast = single_token(args.contrast, engine.tokenizer, "contrast")
    elif contrast is not None and not 0 <= contrast < engine.adapter.vocabulary_size:
        size = engine.adapter.vocabulary_size
        raise ValueError(f"--contrast-id: id {contrast} is outside the vocabulary (0 to {size - 1}).")
    return target if contrast is None else (target, contrast)


def _show(result: Attribution | LayeredAttribution, top: int | None) -> None:
    """In colour on a terminal, else as plain text."""
    from rich.console import Console

    from ..results.render import plain, rich_view

    console = Console()
    if console.is_terminal:
        console.print(rich_view(result, top))
    else:
        print(plain(result, top))


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory; give a smaller --memory-budget, or a shorter prompt. {text}"
    return text or type(error).__name__
