"""The model that --model names: its folder, its config, its components, its device, and the engine on it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import one_line
from .prompts import template_kwargs_of

if TYPE_CHECKING:
    from ..components.base import ComponentKind
    from ..engine import DePass


def silence_transformers() -> None:
    """Show neither the log messages nor the progress bars of transformers."""
    from transformers import modeling_gguf_pytorch_utils as gguf_files
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    own: Any = gguf_files
    own.tqdm = logging.tqdm  # the one that heeds the line above


def path_of(model: str) -> str:
    """The folder, hub name or GGUF file of a model."""
    from ..demo import demo_path

    return str(demo_path() if model == "demo" else Path(model).expanduser())


def config_of(model: str) -> Any:
    """The transformers config of a model, read without any of its weights."""
    from transformers import AutoConfig

    from ..inputs.gguf_files import located, read_once, reading

    path, where = located(path_of(model), {})
    try:
        with read_once(where.get("gguf_file")), reading(where.get("gguf_file")):
            return AutoConfig.from_pretrained(path, **where)
    except ImportError:
        raise
    except Exception as error:  # a config.json may be wrong in many ways
        if where:
            raise  # of a GGUF file, and told
        unknown = "" if Path(path).is_dir() else f"{model!r} is no folder here, and the hub did not give it: "
        raise ValueError(f"--model: {unknown}{_told(error)}") from error


def device_of(name: str | None, *, elsewhere: bool = False) -> str:
    """The name of a device that exists here; None: the best one. ``elsewhere`` allows the GPU of another machine."""
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


def components_of(config: Any, name: str, layer: int | str | list[int] | None) -> ComponentKind:
    """The components that --components and --layer name. The layer is checked before any weight is read.

    Raises:
        ValueError: no layer for components that need one, or a layer that the model does not have.
    """
    from ..components import model as components

    n_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    layers = "its layers" if n_layers is None else f"0 to {n_layers - 1}"
    if layer is None and name != "tokens":
        raise ValueError(f"--layer: {name} belong to a layer; choose one of {layers}.")
    make = getattr(components, name.capitalize())
    if layer == "all" or isinstance(layer, list):
        if name == "tokens":
            raise ValueError(f"--layer: tokens enter at one layer; choose one of {layers}.")
        for one in layer if isinstance(layer, list) else ():
            check_layer(one, n_layers)
        return make(layers=layer)
    kind = make(0 if layer is None else layer)
    check_layer(kind.layer, n_layers)
    return kind


def features_of(
    config: Any, path: Path, layer: int | str | list[int] | None, site: Any, device: str
) -> tuple[ComponentKind, str]:
    """The features that --dictionary, --layer and --site name, and how the dictionary encodes.

    Raises:
        ValueError: the dictionary cannot be read, or its place is not known or not in this model.
    """
    from ..components.features import Features
    from .dictionary import load_dictionary

    if layer == "all" or isinstance(layer, list):
        raise ValueError("--layer: a dictionary belongs to one layer.")
    found, how = load_dictionary(path, device)
    try:
        kind = Features(layer=layer, sae=found, site=site)
    except ValueError as error:
        if not str(error).startswith("layer, site:"):
            raise
        raise ValueError(
            "--layer: the dictionary does not say where it belongs; give a hook's name such as "
            "blocks.5.hook_resid_post, or a number and --site."
        ) from error
    check_layer(kind.layer, getattr(config.get_text_config(), "num_hidden_layers", None))
    return kind, how


def check_layer(layer: Any, n_layers: int | None) -> None:
    """Raise ValueError for a layer that a model of so many does not have."""
    if n_layers is not None and not -n_layers <= layer < n_layers:
        raise ValueError(f"--layer: {layer} is out of range; this model has layers 0 to {n_layers - 1}.")


def engine_of(args: argparse.Namespace, device: str) -> DePass:
    """Load the model of a call on ``device``, with the options that its flags name.

    Raises:
        ValueError: it cannot be loaded, or a flag gives text and there is no tokenizer.
    """
    import torch

    from ..engine import DePass

    options = {
        "allocation": args.allocation,
        "temperature": args.temperature,
        "exclude_special": not args.no_exclude_special,
        "value_activation": args.value_activation,
        "backend": args.backend,
        "memory_budget": args.memory_budget,
        "progress": not args.quiet,
        "verify": args.verify,
        "chat_template_kwargs": template_kwargs_of(args),
    }
    if args.model == "demo":
        from ..demo import load_demo

        model, tokenizer = load_demo(getattr(torch, args.dtype) if args.dtype else None)
        engine = DePass(torch.nn.Module.to(model, torch.device(device)), tokenizer, **options)
    else:
        engine = _loaded(args, device, options)
    if engine.tokenizer is None:
        _refuse_text(args)
    return engine


def _loaded(args: argparse.Namespace, device: str, options: dict[str, Any]) -> DePass:
    from ..engine import DePass
    from ..inputs.loading import load_model

    where = None if device == "cpu" else device  # a model is loaded on the CPU without accelerate
    try:
        model, tokenizer = load_model(path_of(args.model), dtype=args.dtype or "auto", device_map=where)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # transformers raises nearly anything for a folder that is no model
        if type(error).__name__ == "OutOfMemoryError" or str(error).startswith("path: "):
            raise
        raise ValueError(f"--model: {args.model!r} cannot be loaded: {_told(error)}") from error
    return DePass(model, tokenizer, **options)


def _told(error: Exception) -> str:
    """The message of an error of transformers, which need not make sense without its kind."""
    if "ignore_mismatched_sizes" in str(error):  # it points to a report that is not printed
        return "the shapes that its config.json asks for are not those of its weights."
    known = isinstance(error, (OSError, ValueError))
    return one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"


def _refuse_text(args: argparse.Namespace) -> None:
    """Raise ValueError for text in a flag, which needs a tokenizer."""
    for flag, ids in (
        ("prompt", "input-ids"),
        ("target", "target-id"),
        ("contrast", "contrast-id"),
        ("continuation", "continuation-ids"),
    ):
        value = getattr(args, flag, None)
        if isinstance(value, str) or (flag == "prompt" and value is not None):
            raise ValueError(f"--{flag}: text needs a tokenizer, and {args.model!r} has none; give --{ids}.")
