"""Published scripts and notebooks run unchanged: the stand-in, the bridges, and what an old transformers is told."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch
import transformers

from depass_fast.compat import decomposed_state_manager, install, load_ipython_extension
from depass_fast.compat.__main__ import main as run_script
from depass_fast.compat.bridges import bridge
from depass_fast.compat.stand_in import STANDIN
from depass_fast.demo import demo_path, load_demo
from depass_fast.runtime import log
from depass_fast.runtime.versions import OLDEST, check_transformers
from tests.support.family_models import build_model

ROOT = Path(__file__).parents[2]

SCRIPT = """
import argparse, json, multiprocessing, os, sys
sys.path.append(os.path.join(os.path.dirname(__file__), ".."))
from DePass import decomposed_state_manager
import DePass.manager
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_path")
    parser.add_argument("--dataset")
    parser.add_argument("--output")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model_path, torch_dtype=torch.float32).to(torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    manager = decomposed_state_manager(model, tokenizer, mlp_decomposed_function="softmax")
    results = []
    with open(args.dataset) as f:
        data_all = json.load(f)
    for data in data_all:
        target = tokenizer.encode(data["target_token"], add_special_tokens=False)[0]
        state, states = manager.get_last_layer_decomposed_state(data["prompt"])
        scores = manager.compute_attribute_score(state, -1, target).unsqueeze(0).cpu().detach().numpy().tolist()
        neurons = manager.get_mlp_neuron_decomposed_state(data["prompt"], 1)
        assert manager.model is model and manager.tokenizer is tokenizer and len(manager.states) == len(states)
        results.append({"DePass": scores, "neurons": np.asarray(neurons[-1].sum(-1).numpy()).tolist()})
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a worker can import it too
        assert pool.apply(worker)
    with open(args.output, "w") as f:
        json.dump(results, f)

def worker():
    return decomposed_state_manager.__name__ == "decomposed_state_manager"

if __name__ == "__main__":
    main()
"""


def run(command: list[str], *path: Path) -> subprocess.CompletedProcess:
    """Run a command on this checkout's package, its workers too; ``path`` comes first on the module search path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT, env=environment)


def test_a_published_script_runs_unchanged(tmp_path):
    script, data, out = tmp_path / "script.py", tmp_path / "data.json", tmp_path / "out.json"
    script.write_text(SCRIPT)
    prompts = ["Nyria Morstam speaks", "Nyria Morstam"]
    data.write_text(json.dumps([{"prompt": p, "target_token": " the"} for p in prompts]))
    command = [sys.executable, "-m", "depass_fast.compat", str(script), "--model_path", str(demo_path())]
    command += ["--dataset", str(data), "--output", str(out)]
    done = run(command)
    assert done.returncode == 0, done.stderr
    subject = decomposed_state_manager(*load_demo())
    target = subject.tokenizer.encode(" the", add_special_tokens=False)[0]
    for prompt, result in zip(prompts, json.loads(out.read_text()), strict=True):
        state, _ = subject.get_last_layer_decomposed_state(prompt)
        expected = subject.compute_attribute_score(state, -1, target)
        assert torch.allclose(torch.tensor(result["DePass"][0]), expected, atol=1e-5)
        assert len(result["neurons"]) == 1 + subject.model.config.intermediate_size


def test_a_missing_script_is_named(tmp_path):
    with pytest.raises(SystemExit, match="depass_fast.compat: there is no script '.*none.py'"):
        run_script([str(tmp_path / "none.py")])


# -- notebooks ------------------------------------------------------------------------------------------------------

CELLS = """
import sys
sys.path.append("..")
from DePass import decomposed_state_manager, qwenOmnimanager
from DePass.utils import from_states_to_probs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH, torch_dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(PATH)
manager = decomposed_state_manager(model, tokenizer, mlp_decomposed_function="softmax")
attr_state, states = manager.get_last_layer_decomposed_state("Nyria Morstam speaks")
state = model.model.norm(states[-1][0])
probs = from_states_to_probs(state[-1], model.lm_head, tokenizer, topk=4)
heights = model.lm_head(attr_state)[-1, :, probs[0][0]]
inputs = tokenizer("Nyria Morstam speaks", return_tensors="pt")
layer, hidden = 2, model(**inputs, output_hidden_states=True).hidden_states
given = torch.stack([hidden[layer][0] / 3, hidden[layer][0] * 2 / 3])
parts = manager.get_subspace_decomposed_state("Nyria Morstam speaks", start_layer_idx=layer - 1, attribute_state=given)
shares = model.lm_head(parts)[-1, :, probs[0][0]]
"""


@pytest.fixture
def clean(monkeypatch):
    """Undo what a stand-in changes: the search path, the environment, the bridges, and the modules by its name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(torch, "load", torch.load)
    lazy = type(transformers)
    monkeypatch.setattr(lazy, "__getattr__", lazy.__getattr__)
    base = transformers.PreTrainedModel
    call = vars(base).get("__call__")
    yield
    if call is None and "__call__" in vars(base):
        del base.__call__
    for name in [name for name in sys.modules if name.split(".")[0] == "DePass"]:
        del sys.modules[name]


def test_a_notebook_like_the_published_demo(clean):
    load_ipython_extension(None)
    cells: dict = {"PATH": str(demo_path())}
    exec(CELLS, cells)
    model, tokenizer, probs = cells["model"], cells["tokenizer"], cells["probs"]
    logits = model(**tokenizer("Nyria Morstam speaks", return_tensors="pt")).logits[0, -1].detach()
    expected = logits.softmax(-1).topk(4)
    assert [token for token, *_ in probs] == expected.indices.tolist()
    assert [text for _, text, _ in probs] == [tokenizer.decode([i]) for i in expected.indices.tolist()]
    assert torch.allclose(torch.tensor([p for *_, p in probs]), expected.values, atol=1e-5)
    for parts in (cells["heights"], cells["shares"]):
        assert torch.allclose(parts.sum(), logits[probs[0][0]], atol=1e-3)


def test_a_notebook_runs_in_ipython(clean, monkeypatch, tmp_path):
    started = []
    ipython = types.ModuleType("IPython")
    ipython.start_ipython = lambda argv: started.append((argv, Path.cwd()))
    ipython.__spec__ = pickle.__spec__
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.chdir(ROOT)
    notebook = tmp_path / "Demo.ipynb"
    notebook.write_text("{}")
    run_script([str(notebook), "--quick"])
    assert started == [(["Demo.ipynb", "--quick"], tmp_path)] and sys.path[0] == str(STANDIN)
    monkeypatch.setitem(sys.modules, "IPython", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="a notebook needs IPython: pip install ipython. In Jupyter, write `%load_ext"):
        run_script([str(notebook)])


def test_one_line_installs_the_stand_in_for_workers_too(clean):
    importlib.reload(install)
    importlib.reload(install)
    assert sys.path.count(str(STANDIN)) == 1 == os.environ["PYTHONPATH"].split(os.pathsep).count(str(STANDIN))
    import DePass.manager
    import DePass.qwenOmnimanager

    assert DePass.manager.decomposed_state_manager is decomposed_state_manager
    assert Path(DePass.__file__).is_relative_to(STANDIN)


def test_a_module_runs_with_the_stand_in(clean, tmp_path, capsys):
    (tmp_path / "which.py").write_text("import sys, DePass; print(DePass.__file__, __name__, sys.argv[1:])")
    sys.path.insert(0, str(tmp_path))
    run_script(["-m", "which", "--a"])
    assert capsys.readouterr().out == f"{STANDIN / 'DePass' / '__init__.py'} __main__ ['--a']\n"
    with pytest.raises(SystemExit):
        run_script(["-m"])
    assert "usage: python -m depass_fast.compat" in capsys.readouterr().out


def test_another_depass_that_was_imported_before_is_named(clean, monkeypatch, tmp_path):
    other = types.ModuleType("DePass")
    other.__file__ = str(tmp_path / "DePass.py")
    monkeypatch.setitem(sys.modules, "DePass", other)
    with pytest.raises(ImportError, match="DePass: it has been imported already, from .*DePass.py. Start anew"):
        load_ipython_extension(None)


def test_omni_says_that_it_is_not_supported(clean):
    load_ipython_extension(None)
    from DePass import qwenOmnimanager

    with pytest.raises(NotImplementedError, match="Qwen2.5-Omni, with its images, sound and video, is not supported"):
        qwenOmnimanager(None, None, mlp_decomposed_function="softmax")


# -- bridges --------------------------------------------------------------------------------------------------------


@pytest.fixture
def said(clean, monkeypatch, caplog):
    """The lines of the log, with every bridge up."""
    monkeypatch.setattr(log, "_said", set())
    bridge()
    bridge()
    return lambda: [record.getMessage() for record in caplog.records if record.name == "depass_fast"]


class Classifier:
    """Stands for a classifier that a published script pickles."""

    weight = 3


def test_a_pickled_classifier_loads(said, tmp_path):
    file = tmp_path / "classifiers.pt"
    torch.save([Classifier(), torch.ones(2)], file)
    for _ in range(2):
        with open(file, "rb") as stream:
            for source in (file, stream):
                classifier, tensor = torch.load(source)
                assert classifier.weight == 3 and torch.equal(tensor, torch.ones(2))
    assert len(said()) == 1 and "torch.load found more than tensors and unpickles it" in said()[0]
    with pytest.raises(pickle.UnpicklingError):  # who asked for tensors alone gets what was asked for
        torch.load(file, weights_only=True)
    torch.save({"x": torch.ones(2)}, file)
    assert set(torch.load(file)) == {"x"}


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="older ones have it")
def test_the_model_class_that_is_gone(said):
    from transformers import AutoModelWithLMHead

    assert AutoModelWithLMHead is transformers.AutoModelForCausalLM
    assert ["AutoModelWithLMHead is AutoModelForCausalLM" in line for line in said()] == [True]
    with pytest.raises(AttributeError):
        _ = transformers.AutoModelWithTwoHeads


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="older ones have it")
def test_the_model_class_that_is_gone_after_a_model_was_imported(tmp_path):
    """Importing the code of a model puts another module `transformers` in the place of the first."""
    lines = ["import DePass", "import transformers.models.llama.modeling_llama", "import transformers"]
    script = tmp_path / "script.py"
    script.write_text("\n".join([*lines, "print(transformers.AutoModelWithLMHead.__name__)"]))
    done = run([sys.executable, "-m", "depass_fast.compat", str(script)])
    assert (done.returncode, done.stdout) == (0, "AutoModelForCausalLM\n"), done.stderr


def test_attentions_are_returned_where_they_are_asked_for(said):
    model, ids = build_model("llama"), torch.tensor([[3, 1, 4, 1]])
    if not hasattr(model, "set_attn_implementation"):
        pytest.skip("the installed transformers does not change attention of a model that is loaded")
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True)
    model.set_attn_implementation("sdpa")
    assert said() == []
    for _ in range(2):
        found = model(ids, output_attentions=True)
        assert torch.equal(torch.stack(found.attentions), torch.stack(expected.attentions))
    assert model.config._attn_implementation == "sdpa" and not model(ids).get("attentions")
    assert len(said()) == 1 and "output_attentions=True takes eager attention in that call: sdpa" in said()[0]
    decomposed_state_manager(model, None).get_last_layer_decomposed_state(ids)  # our own passes are not disturbed


# -- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["4.44.2", "4.51.0", "4.50.0.dev0", "3.5"])
def test_an_old_transformers_is_told_which_is_needed(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=f"needs transformers 4.51.1 or newer; found {version}. Run: pip install"):
        check_transformers()


@pytest.mark.parametrize("version", ["4.51.1", "4.57.0.dev0", "5.0.0rc1", "5.23.0"])
def test_a_new_transformers_is_right(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    check_transformers()


def test_the_oldest_version_is_that_of_the_package():
    bound, *excluded = re.search(r"transformers>=([\d.]+),!=([\d.]+)", (ROOT / "setup.py").read_text()).groups()
    assert (*map(int, bound.split(".")),) == OLDEST[:2] and excluded == [f"{bound}.0"] and OLDEST[2] == 1


@pytest.mark.parametrize("code", ["from depass_fast.compat import decomposed_state_manager", "import DePass"])
def test_imports_name_the_version_that_is_needed(tmp_path, code):
    info = tmp_path / "transformers-4.44.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.44.2\n")
    (tmp_path / "transformers.py").write_text("__version__ = '4.44.2'")
    (tmp_path / "script.py").write_text(code)
    start = ["-m", "depass_fast.compat", str(tmp_path / "script.py")] if "DePass" in code else ["-c", code]
    done = run([sys.executable, *start], tmp_path)
    assert done.returncode == 1 and "needs transformers 4.51.1 or newer; found 4.44.2" in done.stderr
    assert "Traceback" not in done.stderr or "DePass" not in code
