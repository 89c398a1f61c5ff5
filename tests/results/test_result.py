"""Results: aligned labels, tables, files that carry no code."""

import csv
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from depass_fast import Attribution, Heads, Modules, Neurons, Tokens
from depass_fast.state.completeness import Completeness
from tests.support.models import build, random_ids

IDS = random_ids(5)


@pytest.fixture(params=["one", "several"])
def result(request) -> Attribution:
    return build("qwen2").attribute(IDS, Heads(1), 3 if request.param == "one" else [3, (4, 5)])


def test_labels_are_the_fields_terms():
    dp = build("qwen2")
    assert dp.attribute(IDS, Tokens()).labels == [*(f"'{t}'@{n}" for n, t in enumerate(IDS)), "bias"]
    assert dp.attribute(IDS, Heads(1)).labels == ["L1H0", "L1H1", "L1H2", "L1H3", "rest", "bias"]
    neurons = dp.attribute(IDS, Neurons(0))
    assert neurons.labels[:2] == ["L0N0", "L0N1"] and neurons.labels[47:] == ["L0N47", "rest", "bias"]
    assert dp.attribute(IDS, Modules(2)).labels[:2] == ["L2.attn", "L2.mlp"]


def test_every_result_of_a_batch_has_its_own_prompts_errors(monkeypatch):
    """The error of prompt p in the c-th call is 10 · c + p, plus the number of decompositions before it."""
    dp = build("llama-gqa")

    def numbered(found):
        return [10 * c + torch.arange(len(layout.components)).float() for c, layout in enumerate(found._layouts)]

    monkeypatch.setattr(Completeness, "errors", numbered)
    prompts = [IDS, IDS[:3], IDS[:4]]
    for p, result in enumerate(dp.attribute(prompts, Tokens())):
        assert result.layer_errors.tolist() == [p, 10 + p, 20 + p, 30 + p]
    for p, result in enumerate(dp.attribute(prompts, Heads(layers="all"), method="exact")):
        found = [one.layer_errors.sub(p).tolist() for one in result]
        assert found == [[0, 10, 30, 50], [20, 33, 53], [40, 56]]


def test_scores_have_the_targets_axis_only_for_a_list(result):
    several = len(result.target_names) == 2
    assert result.scores.shape == ((2, 6) if several else (6,))
    assert result.target_logits.shape == ((2,) if several else ())


def test_top_and_score(result):
    scores = result.scores if result.scores.ndim == 1 else result.scores[0]
    top = result.top(2)
    assert [abs(s) for _, s in top] == sorted(scores[:4].abs().tolist(), reverse=True)[:2]
    assert result.top(1, by="positive")[0][1] == pytest.approx(float(scores[:4].max()))
    assert result.top(1, by="negative")[0][1] == pytest.approx(float(scores[:4].min()))
    assert len(result.top(99)) == 4 and len(result.top(99, extras=True)) == 6
    assert result.score("rest") == pytest.approx(float(scores[4]))
    with pytest.raises(KeyError, match="no component 'L9H9'"):
        result.score("L9H9")
    with pytest.raises(IndexError, match="target: 9 is out of range"):
        result.top(1, target=9)
    with pytest.raises(ValueError, match="k: 0 is out of range"):
        result.top(0)
    with pytest.raises(ValueError, match="by: 'size' is not one of"):
        result.top(by="size")


def test_save_and_load(result, tmp_path):
    path = tmp_path / "result.safetensors"
    result.save(path)
    loaded = Attribution.load(path)
    for name, value in vars(result).items():
        other = vars(loaded)[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    with safe_open(str(path), framework="pt") as file:
        assert set(file.metadata()) == {"format", "json"}


def test_attribution_load_opens_layered_files_by_itself(tmp_path):
    """Importing Attribution alone registers the format of several layers, too."""
    path = tmp_path / "layers.safetensors"
    build("qwen2").attribute(IDS, Heads(layers=[0, 2])).save(path)
    program = f"from depass_fast import Attribution; print(Attribution.load({str(path)!r}).layers)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[0, 2]", done.stderr


def test_load_refuses_other_files(tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, str(other))
    with pytest.raises(ValueError, match="not a saved attribution"):
        Attribution.load(other)
    other.write_bytes(b"no safetensors at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Attribution.load(other)
    with pytest.raises(FileNotFoundError):
        Attribution.load(tmp_path / "absent.safetensors")


def test_tables(result, tmp_path):
    pytest.importorskip("pandas")
    frame = result.to_dataframe()
    assert list(frame["label"]) == result.labels and len(frame.columns) == 1 + len(result.target_names)
    result.to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows[1:]] == result.labels
    assert float(rows[1][1]) == pytest.approx(float(result.scores.reshape(-1)[0]))


def test_dataframe_without_pandas_says_how_to_get_it(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'depass-fast\[pandas\]'"):
        result.to_dataframe()


def test_printing(result):
    text = str(result)
    assert "L1H" in text and "completeness" in text.lower()


def test_what_circuitsvis_draws():
    result = build("qwen2").attribute(IDS, Tokens(), [3, 5])
    assert result.to_circuitsvis(1) == {"tokens": result.tokens, "values": result.scores[1][:5].tolist()}
    with pytest.raises(ValueError, match="to_circuitsvis: it colours the prompt, whose tokens these heads are not"):
        build("qwen2").attribute(IDS, Heads(1)).to_circuitsvis()
