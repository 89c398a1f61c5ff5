"""The imports of the command ``depass-fast``: torch and transformers without what no command uses.

Half of the time that transformers takes to be imported goes to torch's compiler and to distributed tensors: a second. A
command compiles nothing and runs in one process. So these packages are stood in for while transformers is imported, and
imported as ever by whoever needs them later. This is for processes that are a command, never for the library.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_DEFERRED = ("torch._dynamo", "scipy", "sklearn")
# decorators that tell the compiler how to take a function
_MARKS = ("allow_in_graph", "assume_constant_result", "disable")


def import_transformers() -> None:
    """Import torch and transformers' models and generation, and freeze all objects that this makes.

    Where transformers needs more than the stand-ins, as another version may, it is imported anew without them.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    collecting = gc.isenabled()
    gc.disable()  # collections find nothing among modules and take a fifth of the time
    try:
        _import_lightly()
        gc.freeze()
    finally:
        if collecting:
            gc.enable()


def _import_lightly() -> None:
    before = set(sys.modules)
    try:
        with _stand_ins():
            importlib.import_module("transformers.modeling_utils")
            importlib.import_module("transformers.generation.utils")
    except Exception:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "transformers":
                del sys.modules[name]


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Stand in for the packages of ``_DEFERRED``, and say that torch is not distributed."""
    import torch.distributed

    finder, is_available = _Finder(), torch.distributed.is_available
    sys.meta_path.insert(0, finder)
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = is_available
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]
        if isinstance(vars(torch).get("_dynamo"), _StandIn):
            del torch._dynamo


class _Finder:
    """Finds a stand-in for every module of the packages that are deferred, unless it was imported before."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if any(name == package or name.startswith(package + ".") for package in _DEFERRED):
            return ModuleSpec(name, self, is_package=True)  # pyright: ignore[reportArgumentType] (it is a loader, too)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _StandIn(ModuleType):
    """A module whose decorators leave functions as they are. Its other functions import the module when called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return _unmarked if name in _MARKS else _deferred(self.__name__, name)


def _unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    """The function itself, or a decorator that returns it."""
    return (lambda decorated: decorated) if function is None else function


def _deferred(module: str, name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call
