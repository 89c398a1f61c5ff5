"""No file that is read can run code: the package calls nothing that would, and its readers refuse hostile files."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from depass_fast import AttentionCredit, AttentionExplanation, Attribution, Continuation, DePass, Generation, Sweep
from depass_fast.cli.main import main
from depass_fast.demo import demo_path, load_demo

ROOT = Path(__file__).parents[1]
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "zipfile", "tarfile", "subprocess"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "os.system",
    "np.load",
    "numpy.load",
    "pandas.read_pickle",
}
# what each may, and why
ALLOWED = {
    ("sweep/over_ray.py", "pickle"): "what its own processes send each other",
    ("compat/bridges.py", "pickle"): "the error that torch.load raises; it loads what a user's script loads",
}


def dangers(path: Path) -> Iterator[str]:
    """The modules and calls of a file that could run what data hold."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name, given = dotted(node.func), {one.arg: one.value for one in node.keywords}
            if name in CALLS and not (name.endswith("np.load") and is_false(given.get("allow_pickle"))):
                yield name
            trusts = "trust_remote_code" in given and not is_false(given["trust_remote_code"])
            if trusts or is_false(given.get("weights_only")):
                yield f"{name}, line {node.lineno}"


def dotted(node: ast.AST) -> str:
    """The name of what is called: `np.load`; empty for what has none."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_false(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_the_package_calls_nothing_that_runs_data():
    package = ROOT / "depass_fast"
    found = {(path.relative_to(package).as_posix(), name) for path in package.rglob("*.py") for name in dangers(path)}
    assert found == set(ALLOWED)


def test_a_danger_is_found(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(
        "import yaml\nfrom joblib import load\nnp.load(x)\nnp.load(x, allow_pickle=False)\neval(x)\nm.eval()\n"
        "load(trust_remote_code=True)\nf(weights_only=False)\n"
    )
    assert sorted(dangers(file)) == ["eval", "f, line 8", "joblib", "load, line 7", "np.load", "yaml"]


class Hostile:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.mkdir, (self.mark,)


@pytest.fixture
def hostile(tmp_path):
    """A pickle that leaves a mark, and the mark."""
    mark = tmp_path / "ran"
    file = tmp_path / "file.safetensors"
    file.write_bytes(pickle.dumps(Hostile(mark)))
    pickle.loads(file.read_bytes())
    assert mark.is_dir(), "the pickle is hostile"
    mark.rmdir()
    return file, mark


@pytest.mark.parametrize("kind", [Attribution, Continuation, Generation, AttentionExplanation, AttentionCredit])
def test_saved_results(hostile, kind):
    file, mark = hostile
    with pytest.raises(ValueError, match=r"file\.safetensors"):
        kind.load(file)
    assert not mark.exists()


def test_saved_ledgers(hostile):
    file, mark = hostile
    with pytest.raises(ValueError, match=r"file\.safetensors"):
        DePass(*load_demo()).load_ledger(file)
    assert not mark.exists()


def test_dictionaries(tmp_path, capsys):
    mark, file = tmp_path / "ran", tmp_path / "sae.npz"
    weights = {name: np.zeros((2, 2)) for name in ("W_enc", "b_enc", "b_dec")}
    np.savez(file, W_dec=np.array([Hostile(mark)], dtype=object), **weights)
    given = ["attribute", "--model", "demo", "--prompt", "a", "--components", "features", "--layer", "2"]
    assert main([*given, "--site", "resid_post", "--dictionary", str(file)]) == 2
    assert "sae.npz" in capsys.readouterr().err and not mark.exists()


def test_sweeps(tmp_path):
    pytest.importorskip("pyarrow")
    mark = tmp_path / "ran"
    (tmp_path / "manifest.json").write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(ValueError, match=r"manifest\.json"):
        Sweep.open(tmp_path)
    assert not mark.exists()


def test_a_models_own_code_is_not_run(tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    for path in demo_path().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "model_type": "its_own"}
    (tmp_path / "config.json").write_text(json.dumps(config | own))
    (tmp_path / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).mkdir()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    with pytest.raises((ValueError, OSError), match="trust_remote_code"):
        DePass.from_pretrained(tmp_path)
    assert not mark.exists()
