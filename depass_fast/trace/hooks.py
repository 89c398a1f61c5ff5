"""Hooks on the modules of a forward pass, which belong to one thread's recorder and leave the others' passes alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ..adapters import Norm

active = threading.local()  # `recorder`: whose forward pass it is that runs in this thread


class Recorder(Protocol):
    """What collects forward passes."""

    def keep(self, record: dict[str, Any], name: str, x: Any) -> None: ...


def is_recording(recorder: Recorder) -> bool:
    """Whether the forward pass of this thread is that recorder's."""
    return getattr(active, "recorder", None) is recorder


class Tap:
    """A hook that records the input or the output of a module, (T, C), or what is ``made`` of it."""

    def __init__(
        self,
        recorder: Recorder,
        record: dict[str, Any],
        name: str,
        made: Callable[[Tensor], Tensor] | None = None,
        batched: bool = False,
    ) -> None:
        self.recorder, self.record, self.name, self.made, self.batched = recorder, record, name, made, batched

    def before(self, module: nn.Module) -> Callable[[], None]:
        """Record the module's input; returned is the way back."""

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._keep(args[0] if args else kwargs["hidden_states"])

        return module.register_forward_pre_hook(hook, with_kwargs=True).remove

    def after(self, module: nn.Module) -> Callable[[], None]:
        """Record the module's output; returned is the way back."""
        return module.register_forward_hook(lambda module, args, output: self._keep(output)).remove

    def _keep(self, x: Any) -> None:
        if not is_recording(self.recorder):  # what another thread runs meanwhile
            return
        if self.batched:
            self.record[self.name] = x
        else:
            x = x[0] if isinstance(x, tuple | list) else x
            x = x.detach().flatten(0, -2)
            self.recorder.keep(self.record, self.name, x if self.made is None else self.made(x))


def full_precision(norm: Norm) -> Callable[..., Tensor]:
    """transformers computes norms in float32 even in a float64 model: that rounding would be all of the error."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].flatten(0, -2)
        y = norm.apply(x, norm.scale(x))
        return (y if norm.bias is None else y + norm.bias).view(args[0].shape)

    return hook
