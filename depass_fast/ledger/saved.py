"""A ledger's file: the pages of the way back as safetensors, and everything else as JSON in its header."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter
from ..components.base import Entry
from ..components.model import Tokens
from ..options import LINEAR, Options
from ..readout.collect import Readout
from ..readout.targets import Directions
from ..request import Request, make_request, wide_dtype, with_trace
from ..results.files import damage_told, read_file, write_result
from ..runtime.dtypes import dtype_name
from ..trace.fingerprint import Fingerprint
from .batches import Packing
from .pages import Pages
from .reads import Reads

FORMAT = "depass_fast.ledger.v1"
_BY_SITE = ("gradients", "totals", "constants", "changes", "sizes")
_SECOND = "steered."  # in front of what belongs to the second book
_BY_LAYER = ("heads", "of_attention", "of_mlp")
_OF_PLACES = ("logits", "bias_scores", "sizes")


def save(
    path: str | Path, request: Request, reads: Reads, pages: Pages, one_position: bool, looking: Pages | None = None
) -> None:
    """Write a ledger's file; ``looking`` is its second book."""
    run, readout = request.run, reads.readout
    tensors: dict[str, Tensor] = {"seeds": reads.seeds, "ids": torch.cat(request.prompts)}
    tensors |= _page_tensors(pages)
    if looking is not None:
        tensors |= {f"{_SECOND}{name}": one for name, one in _page_tensors(looking).items()}
    for place, one in enumerate(readout.directions):
        tensors |= {f"{name}.{place}": getattr(readout, name)[place] for name in _OF_PLACES}
        tensors |= {f"directions.{place}.{name}": value for name, value in _tensors(one).items()}
    content = {
        "fingerprint": asdict(Fingerprint.of(request.adapter.model)),
        "lengths": [len(ids) for ids in request.prompts],
        "batch": request.batch,
        "one_position": one_position,
        "off": 0.0 if looking is None else looking.off,
        "reads": request.reads,
        "directions": [
            {f.name: getattr(one, f.name) for f in fields(one) if not isinstance(getattr(one, f.name), Tensor)}
            for one in readout.directions
        ],
        "options": {
            "allocation": run.allocation.name,
            "exclude_special": request.settings.exclude_special,
            "state_dtype": dtype_name(run.state_dtype),
            "compute_dtype": dtype_name(run.compute_dtype or wide_dtype(request)),
        },
    }
    write_result(path, FORMAT, {name: one.contiguous().cpu().clone() for name, one in tensors.items()}, content)


def restore(
    path: str | Path, adapter: Adapter, tokenizer: Any | None, settings: Options
) -> tuple[Request, Reads, Pages, bool, Pages | None]:
    """Read a ledger's file for the model that it is of; one forward pass makes its trace anew.

    Raises:
        ValueError: the file holds no ledger, or one of another model; the message says what is different.
    """
    _, tensors, text = read_file(path, [FORMAT], "a saved ledger")
    with damage_told(path, FORMAT):
        content = json.loads(text)
        saved, prompts = Fingerprint(**content["fingerprint"]), list(tensors["ids"].split(content["lengths"]))
        options, batch, one_position = content["options"], content["batch"], content["one_position"]
        reads = tuple(tuple(at) for at in content["reads"])
    difference = saved.difference(Fingerprint.of(adapter.model))
    if difference is not None:
        raise ValueError(f"{path}: it is the ledger of another model, {difference}.")
    request = make_request(adapter, tokenizer, settings.updated(options), prompts, Tokens(), encoded=True)
    request = with_trace(replace(request, batch=batch, reads=reads, method=LINEAR))
    with damage_told(path, FORMAT):
        made = _reads(request, tensors, content, adapter.unembedding_device)
        second = {key.removeprefix(_SECOND): one for key, one in tensors.items() if key.startswith(_SECOND)}
        looking = replace(_pages(request, second), off=content.get("off", 0.0)) if second else None
        return request, made, _pages(request, tensors), one_position, looking


def _page_tensors(pages: Pages) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in _BY_SITE:
        found |= {f"{name}.{site.order}": one for site, one in getattr(pages, name).items()}
    for name in _BY_LAYER:
        found |= {f"{name}.{layer}": one for layer, one in getattr(pages, name).items()}
    found |= {} if pages.embedded is None else {"embedded": pages.embedded}
    for layer, parts in pages.neurons.items():
        found |= {f"neurons.{layer}.{i}": one for i, one in enumerate(parts)}
    return found


def _tensors(directions: Directions) -> dict[str, Tensor]:
    values = {field.name: getattr(directions, field.name) for field in fields(directions)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _pages(request: Request, tensors: dict[str, Tensor]) -> Pages:
    """Return the pages; gradients are on the devices of their layers."""
    adapter, pages = request.adapter, Pages()
    last = adapter.n_layers - 1
    for key, one in tensors.items():
        name, *numbers = key.split(".")
        if name in _BY_SITE:
            layer, mid = divmod(int(numbers[0]), 2)
            site = Entry(layer, "resid_mid" if mid else "resid_pre")
            device = adapter.layer_device(min(layer, last)) if name == "gradients" else one.device
            getattr(pages, name)[site] = one.to(device)
        elif name == "embedded":
            pages.embedded = one
        elif name in _BY_LAYER:
            getattr(pages, name)[int(numbers[0])] = one
        elif name == "neurons":
            parts = pages.neurons.setdefault(int(numbers[0]), [])
            parts.append(one)
    for layer, parts in pages.neurons.items():  # in their order, which keys of more than one digit do not have
        pages.neurons[layer] = [tensors[f"neurons.{layer}.{i}"] for i in range(len(parts))]
    return pages


def _reads(request: Request, tensors: dict[str, Tensor], content: dict[str, Any], device: torch.device) -> Reads:
    adapter, trace = request.adapter, request.require_trace()
    directions = []
    for place, values in enumerate(content["directions"]):
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        begin = f"directions.{place}."
        held = {key.removeprefix(begin): one.to(device) for key, one in tensors.items() if key.startswith(begin)}
        directions.append(Directions(**held, **plain))  # pyright: ignore[reportArgumentType]
    of_places = {name: tuple(tensors[f"{name}.{place}"] for place in range(len(directions))) for name in _OF_PLACES}
    norm = adapter.final_norm()
    readout = Readout(
        places=request.places,
        directions=tuple(directions),
        norm=None if norm is None else norm.to(device),
        resid=(trace.before_norm if request.end_given is None else trace.resid(request.end)).to(device),
        dtype=wide_dtype(request),
        end=adapter.stream_end(trace.end_read),
        **of_places,
    )
    return Reads.made(readout, Packing(trace.offsets, request.read_positions), tensors["seeds"].to(device))
