"""The fingerprint of a model: what must be the same for a saved trace to be of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.tuned import tuning
from .weights import plain_tensors

# entries of a config that say nothing about what the model computes
_UNRELATED = {
    *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "id2label", "label2id", "problem_type"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
}
_ELEMENTS = 1 << 24  # of a weight, looked at together
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(frozen=True)
class Fingerprint:
    """The class of a model, its config, its active adapters, and a digest of every weight.

    A weight's digest is a hash of its shape, its dtype and the sums of its bits, read as integers, over every row and
    every column. The sums are exact: they are the same on every device, and an element that changes changes two.
    """

    kind: str
    config: dict[str, Any]
    adapters: str
    weights: dict[str, str]

    @staticmethod
    @torch.no_grad()
    def of(model: nn.Module) -> Fingerprint:
        """Return the fingerprint of a model. Every weight is read, a few times."""
        held: Any = model.config
        config = json.loads(json.dumps(_config(held.to_dict()), default=str, sort_keys=True))
        return Fingerprint(type(model).__name__, config, repr(tuning(model)), _weights(model))

    @property
    def digest(self) -> str:
        """A short digest of the weights alone."""
        return hashlib.sha256(json.dumps(self.weights, sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, other: Fingerprint) -> str | None:
        """Return the first difference of ``other`` in words; None if there is none."""
        if self.kind != other.kind:
            return f"a {self.kind}, not a {other.kind}"
        for name in sorted(self.config.keys() | other.config.keys()):
            here, there = self.config.get(name), other.config.get(name)
            if here != there:
                return f"whose config has {name} = {here!r} where this one has {there!r}"
        for name in sorted(self.weights.keys() | other.weights.keys()):
            if self.weights.get(name) != other.weights.get(name):
                return f"whose weight {name} differs from this one's"
        return None if self.adapters == other.adapters else "with other active adapters"


def _config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config, or a part of one, says about what the model computes."""
    return {
        name: _config(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if name not in _UNRELATED
    }


def _weights(model: nn.Module) -> dict[str, str]:
    """Return the digest of every parameter and of every buffer that is saved with a model, by its name."""
    sums: dict[str, list[Tensor]] = {}
    shared: dict[tuple, str] = {}  # tied weights are read once
    first: dict[str, str] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            first[name] = name
            if value.numel() and _is_plain(value):
                first[name] = shared.setdefault((value.data_ptr(), value.shape, value.stride(), value.dtype), name)
            if first[name] == name:
                sums[name] = list(_sums(value))
    digests = {name: _digest(parts) for name, parts in sums.items()}
    return {name: digests[of] for name, of in first.items()}


def _is_plain(value: Tensor) -> bool:
    """True for a tensor that is not made of others, as those are that hold quantised weights."""
    return not hasattr(value, "__tensor_flatten__")


def _sums(value: Tensor) -> Iterator[Tensor]:
    """Yield what a weight's digest is of: its shape, and the sums of its bits over rows and columns."""
    for held in plain_tensors(value):
        yield from _sums_of_bits(held)


def _sums_of_bits(value: Tensor) -> Iterator[Tensor]:
    yield torch.tensor([value.itemsize, value.is_floating_point(), *value.shape], device="cpu")
    if value.numel():
        bits = value.contiguous().flatten().view(_INTEGERS.get(value.itemsize, torch.uint8))
        bits = bits.view(-1, value.shape[-1]) if value.ndim > 1 and len(bits) == value.numel() else bits[None]
        columns = torch.zeros(bits.shape[1], dtype=torch.int64, device=value.device)
        for rows in bits.split(max(1, _ELEMENTS // bits.shape[1])):
            columns += rows.sum(0, dtype=torch.int64)
            yield rows.sum(1, dtype=torch.int64)
        yield columns


def _digest(parts: list[Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()
