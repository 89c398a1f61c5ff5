"""Imports of a command: no torch where none is needed, and no compiler with transformers."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

import depass_fast
from depass_fast.backends import BACKENDS
from depass_fast.cli import flags, startup
from depass_fast.options import RuleName

REPORT = """
import json, sys
sys.argv = ["depass-fast", *sys.argv[1:]]
from depass_fast.cli.main import main
code = main()
print(json.dumps([code, sorted(sys.modules)]))
"""


def modules_after(*arguments: str) -> tuple[int, set[str]]:
    """The exit code of a command in a process of its own, and the modules that it has imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", REPORT, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(depass_fast.__file__).parents[1],
        env=environment,
        check=True,
    )
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, set(modules)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["attribute", "--help"], 0),
        (["attribute", "--model", "demo", "--prompt", "x"], 2),
        (["attribute", "--model", "demo", "--prompt", "x", "--components", "tokens", "--allocation", "x"], 2),
        (["attribute", "--model", "demo", "--prompt", "x", "--components", "features"], 2),
        (["generate", "--model", "demo", "--chat", "[1]"], 2),
        (["ledger", "--help"], 0),
        (["ledger", "--model", "demo", "--prompt", "x", "--rule", "softmax"], 2),
    ],
)
def test_no_model_no_torch(arguments, code):
    found, modules = modules_after(*arguments)
    assert found == code
    assert not {"torch", "numpy", "transformers", "safetensors", "rich"} & modules


def test_an_attribution_imports_no_compiler():
    arguments = ["--model", "demo", "--device", "cpu", "--prompt", "Nyria Morstam speaks", "--components", "tokens"]
    code, modules = modules_after("attribute", *arguments)
    assert code == 0 and "depass_fast.engine" in modules
    heavy = {"torch._dynamo", "torch._inductor", "triton"}
    if int(transformers.__version__.split(".")[0]) >= 5:  # before, they are imported whatever torch says
        heavy |= {"torch.distributed.tensor", "sympy"}
    assert not heavy & modules
    if not find_spec("accelerate"):  # transformers imports it where it is installed, with all that it needs
        assert not {"scipy", "sklearn", "pandas"} & modules


def test_the_words_of_flags_are_those_of_the_library():
    assert RuleName.__args__ == flags._RULES
    assert ("auto", *BACKENDS) == flags.BACKENDS


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose import is noticed, and that startup stands in for."""
    folder = tmp_path / "heavy_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("def double(x):\n    return 2 * x\n")
    (folder / "part.py").write_text("def triple(x):\n    return 3 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(startup, "_DEFERRED", ("heavy_package",))
    yield "heavy_package"
    for name in [name for name in sys.modules if name.startswith("heavy_package")]:
        del sys.modules[name]


def test_a_stand_in_is_imported_when_it_is_called(package):
    before = torch.distributed.is_available
    with startup._stand_ins():
        heavy = importlib.import_module(package)
        triple = importlib.import_module(f"{package}.part").triple
        assert not torch.distributed.is_available()
        assert heavy.disable(print) is print and heavy.disable(recursive=False)(print) is print
        with pytest.raises(AttributeError, match="heavy_package"):
            _ = heavy.__wrapped__
        double = heavy.double
    assert torch.distributed.is_available is before
    assert not any(name.startswith(package) for name in sys.modules)
    assert not any(isinstance(finder, startup._Finder) for finder in sys.meta_path)
    assert (double(2), triple(2)) == (4, 6)
    assert importlib.import_module(package).double is not heavy.double


def test_transformers_that_needs_more_is_imported_anew(monkeypatch):
    def half_way(name):
        sys.modules["transformers.half_way"] = sys
        raise TypeError("a stand-in is no class")

    monkeypatch.setattr(startup.importlib, "import_module", half_way)
    startup._import_lightly()
    assert "transformers.half_way" not in sys.modules and "transformers" in sys.modules


def test_every_public_name_comes_by_a_star_and_is_listed():
    names: dict[str, object] = {}
    exec("from depass_fast import *", names)
    assert set(depass_fast.__all__) <= set(names) and set(depass_fast.__all__) <= set(dir(depass_fast))
