"""A sparse dictionary (SAE) from a file of weights, as :class:`depass_fast.Features` takes it.

For models and methods of encoding that are not here, load the dictionary in Python, with SAE Lens say.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_WEIGHTS = ("sae_weights.safetensors", "params.npz")  # in a folder: SAE Lens' name, Gemma Scope's name
_KNOWN = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


@dataclass(eq=False)
class Dictionary:
    """F features of hidden states (D,): activations act((x - c) W_enc + b_enc), decoded as activations W_dec + b_dec.

    ``W_enc`` (D, F), ``W_dec`` (F, D), ``b_enc`` (F,), ``b_dec`` (D,). c is ``b_dec`` where ``centred``, else zero.
    act is ReLU; with ``threshold`` (F,) only what exceeds it is kept (JumpReLU), with ``k`` only the k largest are
    (TopK). ``cfg.hook_name`` is the place that it was trained on, None where that is not known.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    k: int | None = None
    centred: bool = False
    cfg: Any = field(default_factory=lambda: SimpleNamespace(hook_name=None))

    def encode(self, x: Tensor) -> Tensor:
        """Activations (1, N, F) of hidden states (1, N, D)."""
        gates = (x - self.b_dec if self.centred else x) @ self.W_enc + self.b_enc
        activations = gates.relu()
        if self.threshold is not None:
            activations = activations * (gates > self.threshold)
        if self.k is not None:
            largest = activations.topk(self.k, dim=-1)
            activations = torch.zeros_like(activations).scatter(-1, largest.indices, largest.values)
        return activations

    def decode(self, activations: Tensor) -> Tensor:
        """Hidden states (1, N, D) of activations (1, N, F)."""
        return activations @ self.W_dec + self.b_dec


def load_dictionary(path: Path, device: str) -> tuple[Dictionary, str]:
    """Read FILE.safetensors, FILE.npz, or a folder with a file of SAE Lens' or Gemma Scope's name.

    Returns the dictionary, and a line on how it encodes.

    A ``cfg.json`` beside the weights, as SAE Lens writes it, says how the dictionary encodes and where it belongs.
    Without one nothing is subtracted before encoding, and act is JumpReLU where there is a threshold, else ReLU.

    Raises:
        ValueError: no such weights, or an encoding that is not here.
    """
    weights = _weights_file(path)
    tensors = _tensors(weights)
    config = weights.with_name("cfg.json")
    settings = _settings(config) if config.is_file() else {}
    jumps = settings.pop("jumprelu", "threshold" in tensors)
    if jumps != ("threshold" in tensors):
        says, holds = ("jumprelu", "no") if jumps else ("another architecture than jumprelu", "a")
        raise ValueError(f"dictionary: {config} says {says}, but {weights.name} holds {holds} threshold.")
    found = Dictionary(**{name: tensor.to(device) for name, tensor in tensors.items()}, **settings)
    if found.k is not None and found.k > len(found.b_enc):
        raise ValueError(f"dictionary: {config} says k = {found.k}, but there are {len(found.b_enc)} features.")
    act = "TopK" if found.k is not None else "ReLU" if found.threshold is None else "JumpReLU"
    x = "(x - b_dec)" if found.centred else "x"
    source = "by its cfg.json" if config.is_file() else "no cfg.json says otherwise"
    return found, f"dictionary: {len(found.b_enc)} features, {act}({x} W_enc + b_enc); {source}"


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"dictionary: {path} is a folder without {' or '.join(_WEIGHTS)}.")


def _tensors(path: Path) -> dict[str, Tensor]:
    """The weights by their names, with biases of zero where the file has none, all of fitting shapes."""
    found = _read(path)
    unknown = [name for name in found if name not in _KNOWN]
    if unknown or "W_enc" not in found or "W_dec" not in found:
        raise ValueError(
            f"dictionary: {path.name} holds {', '.join(found) or 'nothing'}; expected W_enc (D, F) and W_dec (F, D), "
            "and b_enc (F,), b_dec (D,) and threshold (F,) where there are such."
        )
    if found["W_dec"].ndim != 2:
        raise ValueError(f"dictionary: W_dec must have shape (F, D), got {tuple(found['W_dec'].shape)}.")
    dtype = torch.promote_types(found["W_enc"].dtype, found["W_dec"].dtype)
    features, width = found["W_dec"].shape
    shapes = {"W_enc": (width, features), "b_enc": (features,), "b_dec": (width,), "threshold": (features,)}
    for name in ("b_enc", "b_dec"):
        found.setdefault(name, torch.zeros(shapes[name]))
    for name, tensor in found.items():
        if tuple(tensor.shape) != shapes.get(name, tuple(tensor.shape)):
            raise ValueError(
                f"dictionary: {name} must have shape {shapes[name]} beside a W_dec of {(features, width)}, got "
                f"{tuple(tensor.shape)}."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"dictionary: {name} must hold floating-point numbers, got {tensor.dtype}.")
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}
    except Exception as error:  # a broken archive, pickled objects, a dtype that torch does not have
        raise ValueError(f"dictionary: {path} is no archive of arrays ({error}).") from error


def _settings(path: Path) -> dict[str, Any]:
    """The fields of a dictionary that a cfg.json of SAE Lens stands for.

    Raises:
        ValueError: it asks for something that would be left out.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"dictionary: {path} is no JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"dictionary: {path} holds no object.")
    kind = config.get("architecture", "standard")
    act = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    refused = {
        "architecture": kind not in ("standard", "jumprelu", "topk"),
        "activation_fn": act not in ("relu", "topk"),
        "normalize_activations": config.get("normalize_activations") not in (None, "none"),
        "rescale_acts_by_decoder_norm": bool(config.get("rescale_acts_by_decoder_norm")),
        "finetuning_scaling_factor": bool(config.get("finetuning_scaling_factor")),
        "reshape_activations": config.get("reshape_activations") not in (None, "none"),
        "d_out": "d_out" in config,
    }
    for name, wrong in refused.items():
        if wrong:
            raise ValueError(
                f"dictionary: {path} says {name} = {config.get(name)!r}, which the command line does not know; load it "
                "with SAE Lens in Python, and give it as Features(sae=...)."
            )
    top = kind == "topk" or act == "topk"
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if top and (type(k) is not int or k < 1):
        raise ValueError(f"dictionary: {path} says TopK, but its k is {k!r}; expected a positive integer.")
    place = config.get("hook_name") or (config.get("metadata") or {}).get("hook_name")
    return {
        "jumprelu": kind == "jumprelu",
        "k": k if top else None,
        "centred": bool(config.get("apply_b_dec_to_input", True)),
        "cfg": SimpleNamespace(hook_name=place),
    }
