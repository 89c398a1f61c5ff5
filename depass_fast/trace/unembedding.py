"""The model's own logits of hidden states that are known: everything behind the final norm runs, and nothing before it.

The decoder is replaced by one that returns these hidden states. So a hook on the unembedding or on the model, or a
forward pass that a subclass has changed, acts on the logits as in an ordinary pass.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ..adapters import Adapter
from ..runtime.precision import full_precision
from .exclusive import exclusive


@torch.no_grad()
@full_precision()
def own_logits(adapter: Adapter, ids: Tensor, hidden: Tensor) -> Tensor:
    """Return the logits (P, vocabulary) that the model gives at normed final hidden states ``hidden`` (P, D).

    ``ids`` (P,) are the tokens there. Each is the last position of a prompt of its own.

    Raises:
        ValueError: the model does not call its decoder, or calls it with another input than its own.
    """
    end = _KnownEnd(adapter, ids.to(adapter.device)[:, None], hidden)
    with exclusive(adapter) as undo:
        end.take_place(undo)
        inputs: dict[str, Any] = {"use_cache": False} if adapter.takes_cache else {}
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
    return logits[:, -1]


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
    ids: Tensor  # (P, 1)
    hidden: Tensor  # (P, D)
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
        if given is None or given is self.ids:
            return
        expected = self.adapter.embedding(self.ids) if ids is None else self.ids
        is_alike = given.shape == expected.shape
        self.changed = (given != expected.to(given.device)).any() if is_alike else torch.tensor(True, device="cpu")

    def _output(self) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=self.adapter.projected_out(self.hidden)[:, None])
