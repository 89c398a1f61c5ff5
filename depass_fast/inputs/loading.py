"""Loading of a model, and the checks that it can be decomposed, before any work."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..adapters import Adapter
from ..adapters.stored import kind_of, reads_as_computed, unreadable
from ..runtime.dtypes import parse_dtype
from ..runtime.log import warn_user
from .doubts import doubt
from .gguf_files import located, read_once, reading

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
_WHERE = ("revision", "token", "subfolder", "trust_remote_code", "cache_dir", "local_files_only", "gguf_file")
_NO_TOKENIZER = (OSError, ValueError, KeyError, TypeError, AttributeError)
_READING_TOLERANCE = 0.05  # of an output; 8-bit activations round it by 0.01


class WeightsWarning(UserWarning):
    """A checkpoint lacks weights of its model, which are random then."""


def load_model(
    path: str | os.PathLike[str], *, dtype: Any = "auto", device_map: Any = None, **model_kwargs: Any
) -> tuple[nn.Module, Any]:
    """Load the model (in eval mode) and the tokenizer of ``path``, a folder, a hub name or a GGUF file.

    The tokenizer is None where there is none, with a warning for a hub name, and for a GGUF file, which holds one.
    The weights of a GGUF file are dequantised, by default to float32.

    Raises:
        ImportError: ``device_map`` needs accelerate to spread the model over several devices, or a GGUF file a package.
        FileNotFoundError: there is no such GGUF file, or no such folder.
        OSError, ValueError: as transformers raises them.
    """
    folder, model_kwargs = located(path, model_kwargs)
    gguf = model_kwargs.get("gguf_file")
    if gguf and dtype in (None, "auto"):
        dtype = "float32"  # transformers looks for a stored one, in vain where the ending is not in lower case
    if gguf and hasattr(transformers, "GgufConfig"):  # it leaves weights packed on a GPU unless told otherwise
        model_kwargs.setdefault("quantization_config", transformers.GgufConfig(dequantize=True))
    if dtype is not None:
        major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
        name = "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
        model_kwargs[name] = dtype if dtype == "auto" else parse_dtype(dtype, "dtype")
    device = None
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        device, device_map = _single_device(device_map), None
    if device_map is not None:
        model_kwargs["device_map"] = device_map
    with read_once(gguf):
        with reading(gguf):
            model = _complete_model(folder, model_kwargs).eval()
        if device is not None:
            model = model.to(device)
        if gguf:
            model.config._name_or_path = os.path.join(folder, gguf)
        return model, _own_tokenizer(folder, {name: model_kwargs[name] for name in _WHERE if name in model_kwargs})


def _own_tokenizer(path: str, where: dict[str, Any]) -> Any:
    """The tokenizer beside a model; None where there is none, with a warning unless ``path`` is a folder."""
    gguf = where.get("gguf_file")
    expected: tuple[type[Exception], ...] = (Exception,) if gguf else _NO_TOKENIZER
    try:
        return transformers.AutoTokenizer.from_pretrained(path, **where)
    except expected as error:  # it says in various ways that there is none
        if not gguf and any((Path(path) / name).exists() for name in _TOKENIZER_FILES):
            raise  # there is one, and it is broken
        if gguf or not Path(path).is_dir():
            doubt(
                f"tokenizer: none could be read from {gguf or path} ({' '.join(str(error).split())}). Text and "
                "readable labels need one: give DePass(dp.model, tokenizer) one, or the path of a folder that has one."
            )
        return None


def as_tokenizer(given: Any) -> Any:
    """The tokenizer that a tokenizer, a processor, a path or a hub name stands for; None stays None.

    Raises:
        ValueError: no tokenizer can be loaded from there.
        TypeError: it is something else.
    """
    if isinstance(given, (str, os.PathLike)):
        try:
            path, where = located(given, {})
            with read_once(where.get("gguf_file")), reading(where.get("gguf_file")):
                return transformers.AutoTokenizer.from_pretrained(path, **where)
        except _NO_TOKENIZER as error:
            reason = str(error).removeprefix("path: ")
            raise ValueError(f"tokenizer: none could be loaded from {os.fspath(given)!r}: {reason}") from error
    if type(given).__module__.partition(".")[0] == "tokenizers":
        return transformers.PreTrainedTokenizerFast(tokenizer_object=given)
    inner = getattr(given, "tokenizer", None)
    if inner is not None and not hasattr(given, "encode"):
        template = getattr(given, "chat_template", None)
        if template and not getattr(inner, "chat_template", None):  # some processors keep it to themselves
            inner = copy.copy(inner)
            inner.chat_template = template
        return inner
    if given is None or (hasattr(given, "encode") and hasattr(given, "decode") and not isinstance(given, type)):
        return given
    name = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
    raise TypeError(f"tokenizer: expected a tokenizer, a processor that holds one, or a path, got {name}.")


def _complete_model(path: str, model_kwargs: dict[str, Any]) -> Any:
    """The model of ``path``, with a warning where the checkpoint lacks weights: transformers draws those at random."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, report = load(path, **model_kwargs | {"output_loading_info": True})
    lacking = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        name, config = (
            model_kwargs.get("gguf_file") or path,
            "header" if model_kwargs.get("gguf_file") else "config.json",
        )
        warn_user(
            f"model: {name} does not hold {', '.join(lacking[:3])}{more}, as its {config} asks for; these weights "
            "are random, and so is what follows from them. Give a causal language model's checkpoint with its config.",
            WeightsWarning,
        )
    return model


def _single_device(device_map: Any) -> str:
    """The one device of a device map; several need accelerate."""
    if device_map == "auto" and torch.cuda.device_count() <= 1:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, (str, int, torch.device)) and device_map not in ("auto", "balanced", "sequential"):
        return str(torch.device(device_map))
    raise ImportError(
        f"device_map={device_map!r} over several devices needs accelerate: pip install 'depass-fast[device-map]', "
        "or name one device ('cuda:0', 'cpu')."
    )


def check_weights(adapter: Adapter) -> None:
    """Check that all weights can be read as the numbers that the model computes with.

    One module of each kind of quantised or PEFT-wrapped weights is tried on random input.

    Raises:
        ValueError: a weight cannot be read; the message names the module.
    """
    if _cuts_stream(adapter):
        raise ValueError("model: a factor of its residual stream is zero in some channel, which cannot be divided out.")
    modules = [module for index in range(adapter.n_layers) for module in adapter.weighty(index)]
    tried = set()
    ends = [adapter.final_norm_module, None if adapter.head is None else adapter.head.dense, adapter.unembedding]
    for module in [*modules, *(module for module in ends if module is not None)]:
        problem = unreadable(module)
        kind = kind_of(module)
        if problem is None and kind is not None and kind not in tried:
            tried.add(kind)
            problem = _misread(module, adapter.dtype)
        if problem is not None:
            raise ValueError(f"{adapter.name_of(module)}: {problem}")


def _cuts_stream(adapter: Adapter) -> bool:
    """True if a factor by channel of the residual stream is zero anywhere."""
    kinds = [(adapter.block(index), adapter.kind(index)) for index in range(adapter.n_layers)]
    mixes = ((block, mix) for block, kind in kinds for mix in (kind.attention_mix, kind.mlp_mix) if mix is not None)
    return not all(bool(mix(block)[0].all()) for block, mix in mixes)


def _misread(module: nn.Module, dtype: torch.dtype) -> str | None:
    """The reason why a module does not compute with the weight that is read; None if it does."""
    try:
        error = reads_as_computed(module, dtype)
    except ValueError as unreadable:
        return str(unreadable)
    if error <= _READING_TOLERANCE:
        return None
    return (
        f"what this {type(module).__name__} computes is not what its weight says (the outputs differ by {error:.1%}); "
        "merge or dequantise it first."
    )


def check_ready(adapter: Adapter) -> None:
    """Check that the forward pass is not random, as it is in training mode with dropout.

    Raises:
        ValueError: it is; the message names the dropout.
    """
    training = {name: m for name, m in adapter.model.named_modules() if m.training}  # the model or a part of it
    active = [name for name, m in training.items() if isinstance(m, nn.Dropout) and m.p > 0]
    if training:
        active += _random_by_config(adapter.config.to_dict())
    if active:
        raise ValueError(f"model: in training mode with dropout ({', '.join(active[:3])}); call model.eval() first.")


def _random_by_config(config: dict[str, Any]) -> list[str]:
    """The entries of a config that are random in training without a module: dropout, layerdrop, a router's jitter."""
    found = []
    for name, value in ((str(name), value) for name, value in config.items()):
        if isinstance(value, dict):
            found += _random_by_config(value)
        elif any(word in name for word in ("drop", "jitter")) and not name.startswith(("classifier", "summary")):
            found += [name] if isinstance(value, float) and value > 0 else []
    return found
