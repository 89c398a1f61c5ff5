"""A trace that is kept while its prompt and everything that the forward pass reads stay as they are.

Weights are compared by a hash of all their bits: `.data` edits count no version. The hash reads every weight once, but
for the two vocabulary matrices: of the embedding it reads what the prompt's tokens look up, and the unembedding is no
part of a trace. 425 MB of SmolLM2-135M take 30 ms on one core, its forward pass over 38 tokens 155 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters import Adapter
from ..trace.consistency import computation
from ..trace.record import Trace, TraceSource

_PRIMES = (16_411, 65_537, 262_147, 1_048_583, 16_777_259)
_OWN = frozenset(vars(nn.Module())) - {"training"}  # attributes of every module, which hold its parts and hooks
_WATCHING = "transformers.utils.output_capturing"  # its hooks stay, and change nothing
_KINDS = (Tensor, nn.Parameter, nn.Buffer)


@dataclass(frozen=True)
class Fingerprint:
    """A key of everything that a forward pass reads.

    ``inputs`` are the ids and a hash of their embeddings, ``modules`` a key of every module by its id.
    """

    inputs: tuple[int, ...]
    source: TraceSource
    code: tuple
    modules: dict[int, tuple]

    def has(self, module: nn.Module) -> bool:
        """True if a module and all below it are as they were."""
        now = _keys([_Read(part) for part in module.modules()], set())
        return all(self.modules.get(name) == key for name, key in now.items())


@dataclass(frozen=True)
class KeptTrace:
    """A trace, and the fingerprint of what it was taken of; None: it cannot be told."""

    trace: Trace
    fingerprint: Fingerprint | None

    def holds(self, now: Fingerprint | None) -> bool:
        """True if the forward pass would give the same trace again."""
        return now is not None and now == self.fingerprint


@torch.no_grad()
def fingerprint(adapter: Adapter, ids: Tensor) -> Fingerprint | None:
    """Return the fingerprint of the forward pass over ``ids`` (N,), or None where it cannot be told.

    A hook, a replaced `forward`, tensors of an unknown kind (quantised, on no device) and modules that torch does not
    list cannot be told.
    """
    model, embedding = adapter.model, adapter.embedding
    _, (*_, everywhere), code = computation(model)
    if everywhere != ("after",):  # hooks of all modules
        return None
    read = [_Read(module) for module in model.modules()]
    if not all(one.is_plain for one in read) or not {m for one in read for m in one.beside} <= {r.name for r in read}:
        return None
    words = {id(embedding.weight), id(getattr(adapter.unembedding, "weight", None))}
    inputs = *ids.tolist(), *_hashes([embedding(ids.to(adapter.device))])
    return Fingerprint(inputs, TraceSource.of(model), code, _keys(read, words))


class _Read:
    """One module's own tensors and settings, and the ids of modules that it holds by a plain attribute."""

    def __init__(self, module: nn.Module) -> None:
        self.name, held = id(module), vars(module)
        self.tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        self.settings: list[tuple[str, Any]] = []
        self.beside: list[int] = []
        for name, value in held.items():
            if isinstance(value, Tensor):
                self.tensors.append(value)
            elif name not in _OWN:
                self.settings.append((name, _key(value)))
                self.beside += [id(value)] if isinstance(value, nn.Module) else []
        known = all(type(t) in _KINDS and not t.is_meta and not t.is_quantized for t in self.tensors)
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        is_hooked = any(getattr(hook, "__module__", None) != _WATCHING for hook in hooks)
        self.is_plain = known and not is_hooked and "forward" not in held


def _keys(read: list[_Read], skipped: set[int]) -> dict[int, tuple]:
    """Return a key of every module by its id: its settings and its own tensors but those of the ids ``skipped``."""
    held = [[tensor for tensor in one.tensors if id(tensor) not in skipped] for one in read]
    hashes = iter(_hashes([tensor for tensors in held for tensor in tensors]))
    return {
        one.name: (one.settings, *((t.dtype, t.device, t.shape, next(hashes)) for t in tensors))
        for one, tensors in zip(read, held, strict=True)
    }


def _key(value: Any) -> Any:
    """Return a key of a setting: its contents, where they are plain; else its identity and what it holds."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return repr(value)
    return id(value), None if isinstance(value, nn.Module) else repr(getattr(value, "__dict__", None))


def _hashes(tensors: list[Tensor]) -> list[int]:
    """Return a hash of the bits of every tensor; one wait for every device."""
    found: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for place, tensor in enumerate(tensors):
        found.setdefault(tensor.device, []).append((place, _hash(tensor)))
    values = [0] * len(tensors)
    for pairs in found.values():
        hashes = torch.stack([value for _, value in pairs]).tolist()
        for (place, _), value in zip(pairs, hashes, strict=True):
            values[place] = value
    return values


def _hash(tensor: Tensor) -> Tensor:
    """Return a hash of a tensor's bits, an int64 on its device: Σ_i word[i] · odd[i mod p], modulo 2^64.

    The words are 8 bytes each. One that changes changes the hash, as its factor is odd. The prime p exceeds every axis,
    so that two slices along an axis never have the same factors: to swap them changes the hash, too.
    """
    prime = next((p for p in _PRIMES if p > max(tensor.shape, default=1)), _PRIMES[-1])
    factors = _odd(prime, tensor.device)
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = len(raw) // 8 * 8
    words = (raw[:whole] if raw.storage_offset() % 8 == 0 else raw[:whole].clone()).view(torch.int64)
    rows = len(words) // prime * prime
    left = len(words) - rows
    if rows:
        folded = words[:rows].view(-1, prime).sum(0)
        folded[:left] += words[rows:]
    else:
        folded, factors = words, factors[:left]
    value = (folded * factors).sum()
    if whole < len(raw):
        value += (raw[whole:].to(torch.int64) * _odd(prime, tensor.device)[: len(raw) - whole]).sum()
    return value


@lru_cache(maxsize=16)
def _odd(count: int, device: torch.device) -> Tensor:
    """Return ``count`` odd factors, drawn once and for all."""
    factors = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    return (2 * factors + 1).to(device)
