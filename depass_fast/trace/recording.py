"""The hook that records what a module is given, or what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..adapters.streams import Watch
from .plugged import is_recording
from .recorder import Recorder


def keeps(recorder: Recorder, record: dict[str, Any], module: nn.Module, watch: Watch) -> Callable[[], None]:
    """Have a ``record`` keep what ``watch`` sees in a module's calls. Returns the function that removes the hook."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if is_recording(recorder):
            for name, x in watch(args, kwargs, output).items():
                recorder.keep(record, name, x)

    return module.register_forward_hook(hook, with_kwargs=True).remove


class RecordingHook:
    """A hook that records the input or the output of a module as (T, C), or the result of ``change`` on it.

    With ``as_is`` it keeps the axis of the batch, and only the last forward pass.
    """

    def __init__(
        self,
        recorder: Recorder,
        record: dict[str, Any],
        name: str,
        change: Callable[[Tensor], Tensor] | None = None,
        as_is: bool = False,
    ) -> None:
        self.recorder, self.record, self.name, self.change, self.as_is = recorder, record, name, change, as_is

    def before(self, module: nn.Module) -> Callable[[], None]:
        """Record the module's input. Returns the function that removes the hook."""

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._keep(args[0] if args else kwargs["hidden_states"])

        return module.register_forward_pre_hook(hook, with_kwargs=True).remove

    def after(self, module: nn.Module, added: nn.Module | None = None) -> Callable[[], None]:
        """Record the module's output, plus that of the module ``added``, which is called next; None: there is none.

        Returns the function that removes the hooks.
        """
        if added is None:
            return module.register_forward_hook(lambda module, args, output: self._keep(output)).remove
        own: list[Tensor] = []

        def first(module: nn.Module, args: tuple, output: Tensor) -> None:
            if is_recording(self.recorder):
                own[:] = [output]

        def second(module: nn.Module, args: tuple, output: Tensor) -> None:
            if own and is_recording(self.recorder):
                self._keep(own.pop() + output)

        handles = module.register_forward_hook(first), added.register_forward_hook(second)

        def undo() -> None:
            for handle in handles:
                handle.remove()

        return undo

    def _keep(self, x: Any) -> None:
        if not is_recording(self.recorder):  # another thread's pass
            return
        if self.as_is:
            self.record[self.name] = x
        else:
            x = x[0] if isinstance(x, tuple | list) else x
            x = x.detach().flatten(0, -2)
            self.recorder.keep(self.record, self.name, x if self.change is None else self.change(x))
