"""The model that --model names: its folder, its config, the components that it has, and the device for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import one_line

if TYPE_CHECKING:
    from ..components.base import ComponentKind


def silence_transformers() -> None:
    """Show neither the log messages nor the progress bars of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def path_of(model: str) -> str:
    """The folder or hub name of a model."""
    from ..demo import demo_path

    return str(demo_path() if model == "demo" else Path(model).expanduser())


def config_of(model: str) -> Any:
    """The transformers config of a model, read without any of its weights."""
    from transformers import AutoConfig

    path = path_of(model)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        where = "" if Path(path).is_dir() else f"{model!r} is no folder here, and the hub did not give it: "
        raise ValueError(f"--model: {where}{one_line(error)}") from error


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


def components_of(config: Any, name: str, layer: int | str | None) -> ComponentKind:
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
    if layer == "all":
        if name == "tokens":
            raise ValueError(f"--layer: tokens enter at one layer; choose one of {layers}.")
        return make(layers="all")
    kind = make(0 if layer is None else layer)
    if n_layers is not None and not -n_layers <= kind.layer < n_layers:
        raise ValueError(f"--layer: {kind.layer} is out of range; this model has layers {layers}.")
    return kind
