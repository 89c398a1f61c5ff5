"""The model's own logits of hidden states that are known: everything behind the final norm runs, and nothing before it.

The decoder is replaced by one that returns these hidden states. So a hook on the unembedding or on the model, or a
forward pass that a subclass has changed, acts on the logits as in an ordinary pass. Such code may name a position, or
look at other ones: it must be shown the whole prompt. Where there is none, single positions will do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from transformers.utils.generic import ModelOutput

from ..adapters import Adapter
from ..adapters.family import Path
from ..adapters.paths import below, exists
from ..runtime.precision import full_precision
from .exclusive import exclusive

# packages whose modules take every position alike, and those of the bases of classes
_PLAIN = {"torch", "transformers", "accelerate", "abc", "builtins", "typing"}


def modules_behind(adapter: Adapter) -> Iterator[nn.Module]:
    """Yield the modules whose hooks or code act behind the final norm: those around the layers, and the unembedding."""
    model, family = adapter.model, adapter.family
    *around, _layers = _on_the_way(model, family.layers)
    yield from around
    for path in (family.unembedding, family.project_out, family.head):
        if path is not None:
            yield from _on_the_way(model, path)[1:]
    if family.head is not None:
        yield from below(model, family.head).children()
    yield adapter.unembedding  # that inside of a wrapper


def _on_the_way(model: nn.Module, path: Path) -> list[nn.Module]:
    """Return the modules from ``model`` to the one at ``path``."""
    names = (path,) if isinstance(path, str) else path
    parts = next(name for name in names if exists(model, name)).split(".")
    return [model, *(attrgetter(".".join(parts[: depth + 1]))(model) for depth in range(len(parts)))]


def is_plain(adapter: Adapter) -> bool:
    """True if no hook and no code of a user's acts behind the final norm, so that every position is read alike."""
    if module_hooks._global_forward_pre_hooks or module_hooks._global_forward_hooks:
        return False
    return not any(m._forward_pre_hooks or m._forward_hooks or _has_own_code(m) for m in modules_behind(adapter))


def _has_own_code(module: nn.Module) -> bool:
    """True if the module's class, or any of its bases, or its forward pass is not one of the plain packages'."""
    homes, forward = [base.__module__ for base in type(module).__mro__], module.forward
    while forward is not None:  # the function in front, and those that it says it wraps
        code = getattr(forward, "func", forward)
        homes.append(getattr(code, "__globals__", {}).get("__name__", ""))
        forward = getattr(forward, "__wrapped__", None)
    return any(home.split(".")[0] not in _PLAIN for home in homes)


@torch.no_grad()
@full_precision()
def own_logits(adapter: Adapter, ids: Tensor, hidden: Tensor) -> Tensor:
    """Return the logits (P, N, vocabulary) of the model at normed final hidden states ``hidden`` (P, N, D).

    ``ids`` (P, N) are the tokens there, those of P prompts.

    Raises:
        ValueError: the model does not call its decoder, or calls it with another input than its own.
    """
    end = _KnownEnd(adapter, ids.to(adapter.device), hidden)
    with exclusive(adapter) as undo:
        end.take_place(undo)
        inputs: dict[str, Any] = dict(adapter.cache_choice)
        output: Any = adapter.model(input_ids=end.ids, **inputs)
    logits = output.logits if hasattr(output, "logits") else output[0]
    if not end.was_called:
        raise ValueError(
            f"model: {type(adapter.model).__name__} does not call its decoder, {type(adapter.decoder).__name__}, so "
            "that what it computes cannot be compared with the traced forward pass; take the class of transformers."
        )
    if end.changed is not None and bool(end.changed):
        raise ValueError(
            f"model: a hook on {type(adapter.model).__name__} changes its input before the decoder reads it; the trace "
            "has not seen that. Give the changed ids as the prompt, or put the hook on a module inside the decoder."
        )
    return logits


@dataclass
class _DecoderOutput(ModelOutput):
    """The output of a decoder that has nothing but its last hidden states."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@dataclass
class _KnownEnd:
    """The decoder's stand-in for the thread that made it; other threads may use the model meanwhile."""

    adapter: Adapter
    ids: Tensor  # (P, N)
    hidden: Tensor  # (P, N, D)
    was_called: bool = False
    changed: Tensor | None = None
    thread: int = field(default_factory=threading.get_ident)

    def take_place(self, undo: ExitStack) -> None:
        """Stand in for the decoder's forward pass until the end, or for that of a module in it that holds the layers.

        OPT calls the latter.
        """
        whole = self.adapter.decoder
        path = next(name for name, module in whole.named_modules() if module is self.adapter.blocks)
        names = path.split(".")
        for depth in range(len(names)):
            self._replace(whole.get_submodule(".".join(names[:depth])), undo)

    def _replace(self, decoder: Any, undo: ExitStack) -> None:
        undo.callback(decoder.register_forward_pre_hook(self._read, with_kwargs=True, prepend=True).remove)
        own = decoder.forward
        if "forward" in vars(decoder):
            undo.callback(setattr, decoder, "forward", own)
        else:
            undo.callback(delattr, decoder, "forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._output() if threading.get_ident() == self.thread else own(*args, **kwargs)

        decoder.forward = forward

    def _read(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note whether the decoder is given another input than the model was."""
        if threading.get_ident() != self.thread:
            return
        self.was_called = True
        ids, embedded = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        given = embedded if ids is None else ids
        if given is not None and given is not self.ids:
            self._compare(given, self.adapter.embedding(self.ids) if ids is None else self.ids)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._compare(mask, torch.ones_like(self.ids))
        if isinstance(positions, Tensor) and positions.ndim == 2:
            usual = torch.arange(self.ids.shape[1], device=self.ids.device)
            self._compare(positions, usual.expand(len(positions), -1))

    def _compare(self, given: Tensor, expected: Tensor) -> None:
        is_alike = given.shape == expected.shape
        found = (given != expected.to(given.device)).any() if is_alike else torch.tensor(True, device="cpu")
        self.changed = found if self.changed is None else self.changed.to(found.device) | found

    def _output(self) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=self.adapter.projected_out(self.hidden))
