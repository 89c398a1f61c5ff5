"""The manifest of a run: everything that must be the same for it to be gone on with."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..allocation import Allocation
from ..components.base import ComponentKind
from ..inputs.prompt_set import Checked
from ..inputs.provenance import provenance_of
from ..options import Adjoint
from ..runtime.dtypes import dtype_name
from ..trace.fingerprint import Fingerprint
from .asked import Asked
from .folder import ERRORS, SCORES, shards

NAME, FORMAT = "manifest.json", "depass_fast.sweep.v1"
_NOT_COMPARED = ("created", "model.model", "model.revision", "data.name")  # the digests say what it is

_MEANS = {
    "data.sha256": "the prompts, their order or their fields are others",
    "model.weights": "the weights are others",
    "model.tokenizer": "the tokenizer or its chat template is another",
    "components.tensors": "the vectors or the dictionary are others",
}


def manifest_of(asked: Asked, data: Checked, name: str, top: int | None, dense: bool) -> dict[str, Any]:
    """Return the manifest of a sweep over ``data``, JSON values; every weight of the model is read for its digest."""
    adapter, source = asked.adapter, provenance_of(asked.adapter)
    versions = {name: getattr(source, name) for name in ("depass_fast", "torch", "transformers")}
    model: dict[str, Any] = {name: value for name, value in asdict(source).items() if name not in versions}
    fingerprint = Fingerprint.of(adapter.model)
    model |= {"dtype": dtype_name(adapter.dtype), "weights": fingerprint.digest}
    model |= {"config": _hash(fingerprint.config), "tokenizer": _of_tokenizer(asked.tokenizer)}
    return {
        "format": FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
        "model": model,
        "data": {"name": name, "prompts": data.count, "sha256": data.sha256},
        "components": _described(asked.components, asked),
        "target_kind": asked.target_kind,
        "method": asdict(asked.method) if isinstance(asked.method, Adjoint) else asked.method,
        "options": _options(asked),
        "output": {"top": top, "dense": dense},
    }


def _described(kind: ComponentKind, asked: Asked) -> dict[str, Any]:
    each = kind.each(asked.adapter)
    layers = [one.resolve(asked.adapter) for one in each]
    found = {"kind": kind.kind, "layers": layers if kind.is_layered else layers[0], "site": each[0].site}
    if tensors := [tensor for one in each for tensor in _tensors(one)]:
        found["tensors"] = _digest(tensors)
    labels = [getattr(one, "labels", None) for one in each]
    if any(one is not None for one in labels):
        found["labels"] = _hash(labels)
    return found


def _tensors(kind: ComponentKind) -> list[Tensor]:
    """Return the tensors that components are made of: the user's, and all of a dictionary's."""
    sae = getattr(kind, "sae", None)
    if sae is None:
        return list(kind.user_tensors())
    held = sae.state_dict() if isinstance(sae, torch.nn.Module) else vars(sae) if hasattr(sae, "__dict__") else {}
    own = [held[name] for name in sorted(held) if isinstance(held[name], Tensor)]
    return own or list(kind.user_tensors())


def _of_tokenizer(tokenizer: Any | None) -> str | None:
    """Return a hash of what a tokenizer does: its vocabulary and rules, and its chat template."""
    if tokenizer is None:
        return None
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if hasattr(backend, "to_str") else getattr(tokenizer, "name_or_path", "")
    return _hash([type(tokenizer).__name__, rules, str(getattr(tokenizer, "chat_template", None))])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _options(asked: Asked) -> dict[str, Any]:
    """Return the options that numbers depend on; how much memory is taken, and where, changes no result."""
    options, special = asked.settings, asked.settings.exclude_special
    state, compute = options.dtypes(asked.adapter.dtype, asked.adapter.device)
    given = options.chat_template_kwargs
    return {
        "allocation": Allocation(options.allocation).name,
        "temperature": options.temperature,
        "value_activation": options.value_activation,
        "exclude_special": special if isinstance(special, bool) else list(special),
        "state_dtype": dtype_name(state),
        "compute_dtype": dtype_name(compute),
        "chat_template_kwargs": None if given is None else json.loads(json.dumps(dict(given), default=str)),
    }


def claim(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest into a folder, or compare it with the one that is there. Processes may do so at once.

    Raises:
        ValueError: the folder holds another run; the message says what differs.
        OSError: it cannot be written.
    """
    path = folder / NAME
    if not path.exists() and (shards(folder, SCORES) or shards(folder, ERRORS)):
        raise ValueError(f"out: {folder} holds files of a run, and no {NAME} that says of which; give another folder.")
    part = folder / f".{NAME}.{uuid.uuid4().hex}.part"
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(json.dumps(manifest, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)  # there whole, or not at all, and by one process only
            return
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                os.replace(part, path)
                return
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
    check_same(folder, manifest)


def check_same(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ValueError where the manifest of a folder differs; the message says in what."""
    before, after = _flat(read(folder)), _flat(manifest)
    for name in dict.fromkeys([*after, *before]):
        if name not in _NOT_COMPARED and before.get(name) != after.get(name):
            said = _MEANS.get(name)
            raise ValueError(
                f"out: {folder} holds another run, whose {name} is {before.get(name)!r}; here it is "
                f"{after.get(name)!r}{'' if said is None else f': {said}'}. Give another folder, or the same options."
            )


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or a later version's.
    """
    path = folder / NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: it holds no sweep ({NAME} is missing).")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        written_by = found["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error}).") from None
    if written_by != FORMAT:
        raise ValueError(f"{path}: its format is {written_by!r}, and this version reads {FORMAT!r}.")
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under names with dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
