"""The pictures of results: what is drawn sums to what is stated, in the Axes that are given, with every warning."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib", reason="pictures need the extra plot")
from matplotlib import pyplot  # noqa: E402

from depass_fast import Adjoint, Contrast, DePass, Heads, Modules, Neurons, Tokens  # noqa: E402
from depass_fast.cli.main import main  # noqa: E402
from depass_fast.demo import load_demo  # noqa: E402
from depass_fast.plots import plot_positions  # noqa: E402

matplotlib.use("agg")
PROMPT = "When Diane met Grace at the park, Grace handed the camera to"
ASKED = {"target": " Diane", "contrast": " Grace"}


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def dp() -> DePass:
    return DePass(*load_demo())


@pytest.fixture(scope="module")
def tokens(dp):
    return dp.attribute(PROMPT, Tokens(), **ASKED)


@pytest.fixture(scope="module")
def ledger(dp):
    return dp.ledger(PROMPT, Contrast(" Diane", " Grace"), rule="shapley", attention=True)


def table(ax) -> np.ndarray:
    """The cells of a heat map, zero where there are none."""
    (image,) = ax.images
    return np.nan_to_num(np.ma.filled(image.get_array(), 0.0))


def words(ax) -> str:
    return "\n".join([ax.get_title(loc="left"), *(text.get_text() for text in ax.texts)])


def test_bars_sum_to_the_logit(tokens):
    ax = tokens.plot()
    assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(9.3137, abs=1e-3)
    assert [text.get_text() for text in ax.get_xticklabels()][:4] == ["<s>", "When", "Diane", "met"]
    for part in ("logit difference 9.3137", "bars sum to 9.31", "attention frozen", "completeness error"):
        assert part in words(ax).replace("\n", " ")
    ax = tokens.plot(kind="leading", top=3)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["' Diane'@2", "' Grace'@4", "' Grace'@9", "11 others"]
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(9.3137, abs=1e-3)


def test_tokens_as_text_and_as_a_curve(tokens):
    ax = tokens.plot(kind="strip")
    assert [text.get_text() for text in ax.texts[1:]][:3] == ["<s>", "When", " Diane"]
    (curve,) = [line for line in tokens.plot(kind="curve").lines if len(line.get_xdata()) > 1]
    sizes = tokens.scores.abs().sort(descending=True).values
    assert curve.get_ydata()[0] == pytest.approx(100 * float(sizes[0] / sizes.sum()), abs=1e-3)
    assert curve.get_ydata()[-1] == pytest.approx(100)
    assert all(tick == round(tick) for tick in curve.axes.get_xticks()), "tokens are counted"
    assert [text.get_text() for text in curve.axes.texts][:2] == ["1 holds 50 %", "3 hold 90 %"]


def test_heads_of_a_layer_and_of_all(dp):
    heads = dp.attribute(PROMPT, Heads(layers="all"), **ASKED)
    ax = heads.plot()
    assert table(ax).sum(1) == pytest.approx(np.full(6, 9.3137), abs=1e-3), "rest is among the columns"
    assert table(ax)[:, :8] == pytest.approx(heads.scores.numpy(), abs=1e-5)
    ax = heads[3].plot()
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(9.3137, abs=1e-3)
    assert ax.get_xlim()[1] < 1 < ax.patches[-1].get_width(), "the rest does not make the heads small"


def test_several_targets_and_positions(dp):
    found = dp.attribute(PROMPT, Tokens(), target=[" Diane", " Grace"], position=[5, -1])
    both = found[1]
    assert table(both.plot(kind="targets")).sum(1) == pytest.approx(both.target_logits.numpy(), abs=1e-3)
    bars = both.plot(target=1).patches
    assert sum(bar.get_height() for bar in bars) == pytest.approx(float(both.target_logits[1]), abs=1e-3)
    ax = plot_positions(found)
    assert table(ax).sum(1) == pytest.approx([float(one.target_logits[0]) for one in found], abs=1e-3)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["at (5)", "to (13)"]
    with pytest.raises(ValueError, match="for a list of positions of one layer"):
        plot_positions([both, dp.attribute(PROMPT, Heads(2))])


def test_approximate_scores_say_so(dp):
    neurons = dp.attribute(PROMPT, Neurons(layers="all"), " Diane", method=Adjoint(refine=5, sample=16))
    neurons = replace(neurons, warnings=["the scores of layer 0 are off"])
    for ax in (neurons.plot(top=4), neurons.plot(kind="curve", caption=False)):
        said = words(ax).replace("\n", " ")
        assert "APPROXIMATE scores, of first order (sample of" in said
        assert "WARNING: the scores of layer 0 are off" in said
    assert "logit" not in said, "without a caption there are warnings alone"
    layer = neurons[3].plot(top=4)
    assert sum(bar.get_width() for bar in layer.patches) == pytest.approx(float(neurons[3].scores.sum()), abs=1e-3)
    assert [text.get_text() for text in layer.get_yticklabels()][-2:] == ["508 others", "rest"]


def test_ledgers(ledger, dp):
    ax = ledger.plot()
    assert table(ax).shape == (6, 14) and table(ax).sum(1) == pytest.approx(np.full(6, 9.3137), abs=1e-3)
    assert table(ax)[2] == pytest.approx(ledger.tokens(layer=2).scores.numpy(), abs=1e-5)
    assert sum(bar.get_height() for bar in ledger.plot(kind="tokens").patches) == pytest.approx(9.3137, abs=1e-3)
    ax = ledger.plot(kind="modules")
    assert sorted(bar.get_height() for bar in ax.patches[:12]) == pytest.approx(
        sorted(ledger.modules().scores.flatten().tolist()), abs=1e-5
    )
    assert table(ledger.plot(kind="heads"))[:, :8] == pytest.approx(ledger.heads().scores.numpy(), abs=1e-5)
    neurons = ledger.plot(kind="neurons", top=3)
    assert [bar.get_width() for bar in neurons.patches] == pytest.approx([s for _, s in ledger.neurons().top(3)])
    assert "credit of attention" in words(ledger.steered.plot()).replace("\n", " ")
    with pytest.raises(ValueError, match="kind: 'all' is not a picture of a ledger; there are 'positions', 'tokens'"):
        ledger.plot(kind="all")
    with pytest.raises(IndexError, match="prompt"):
        ledger.plot(prompt=1)


def test_attention(dp):
    why = dp.explain_attention(PROMPT, Tokens(), layer=4, head=4)
    log_p = why.probabilities.log().double() + why.entropy.double()
    assert table(why.plot()).sum(1) == pytest.approx(log_p.numpy(), abs=1e-3)
    assert sum(bar.get_height() for bar in why.plot(kind="probabilities").patches) == pytest.approx(1, abs=1e-5)
    ax = why.plot(key=4, top=3)
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(float(why.scores[4]), abs=1e-3)
    pair = dp.explain_attention(PROMPT, Heads(2), layer=4, head=4, key=(12, 4))
    assert sum(bar.get_width() for bar in pair.plot().patches) == pytest.approx(
        float(pair.scores[0] - pair.scores[1]), abs=1e-3
    )
    credit = dp.attention_credit(PROMPT, Tokens(), " Diane", contrast=" Grace")
    assert table(credit.plot()) == pytest.approx(credit.changes.numpy(), abs=1e-5)
    ax = credit.plot(kind="leading", top=2)
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(float(credit.changes.sum()), abs=1e-3)


def test_generations_and_continuations(dp):
    text = dp.attribute_generation("When Grace handed Nyria Morstam", max_new_tokens=3)
    ax = text.plot()
    ax.figure.draw_without_rendering()
    rows, above = ax.yaxis.label.get_window_extent(), [one for one in (ax._left_title, *ax.texts) if one.get_text()]
    assert not any(rows.overlaps(one.get_window_extent()) for one in above), "the label stays below the words"
    assert table(ax).sum(1) == pytest.approx(text.logits.numpy(), abs=1e-3)
    assert np.isnan(np.ma.filled(ax.images[0].get_array(), np.nan)[0, -1]), "no share before a token is there"
    told = text.plot(read="log-prob")
    assert table(told).sum(1) == pytest.approx((text.log_probs + text.entropies).numpy(), abs=1e-3)
    total = float(text.sum.target_logits)
    assert sum(bar.get_height() for bar in text.plot(kind="sum").patches) == pytest.approx(total, abs=1e-3)
    layers = dp.attribute("Nyria Morstam", Modules(layers=[0, 5]), continuation=" speaks Italian")
    assert len(layers.plot().patches) >= 4


def test_the_axes_that_are_given_are_drawn_in(tokens, ledger):
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3))
    before = figure.get_size_inches().tolist()
    assert tokens.plot(left) is left and ledger.plot(right, kind="heads", caption=False) is right
    assert figure.get_size_inches().tolist() == before and pyplot.get_fignums() == [figure.number]
    assert len(right.images) == 1 and left.patches and not right.get_title(loc="left")
    assert tokens.plot(width="page").figure.get_figwidth() == 6.8
    with pytest.raises(TypeError, match="ax: expected matplotlib Axes, got Figure"):
        tokens.plot(figure)
    with pytest.raises(ValueError, match="kind: 'targets' is not a picture of tokens at layer 0; there are 'tokens'"):
        tokens.plot(kind="targets")
    with pytest.raises(ValueError, match="top: 0 is out of range"):
        tokens.plot(kind="leading", top=0)


@pytest.mark.parametrize("kind", ["tokens", "strip", "leading", "curve"])
def test_wishes_are_checked_whether_a_picture_needs_them_or_not(tokens, kind):
    for wrong in ({"width": 0}, {"limit": -1}, {"cmap": "nocmap"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            tokens.plot(kind=kind, **wrong)


def test_colours_of_a_text_have_a_limit(tokens):
    bar = tokens.plot(kind="strip", limit=5.0).figure.axes[1]
    assert [text.get_text() for text in bar.get_yticklabels()] == ["−5", "0", "5"]


def test_a_missing_matplotlib_is_told_before_any_work(tokens, ledger, dp, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (tokens.plot, ledger.plot, lambda: plot_positions([])):
        with pytest.raises(ImportError, match=r"plot: the package matplotlib is not installed.*depass-fast\[plot\]"):
            draw()
    for command in ("attribute --components tokens", "ledger"):
        given = [*command.split(), "--model", "nowhere/nothing", "--prompt", "a", "--plot", str(tmp_path / "a.png")]
        assert main(given) == 2 and "depass-fast[plot]" in capsys.readouterr().err


def test_nothing_imports_matplotlib_before_a_picture_is_drawn():
    for path in sorted((Path(__file__).parents[2] / "depass_fast").rglob("*.py")):
        assert not re.search(r"^(import|from) matplotlib", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_the_commands_draw(tmp_path, capsys):
    start = ["--model", "demo", "--target", " Diane", "--quiet", "--plot", str(tmp_path / "a.svg")]
    assert main(["attribute", *start, "--prompt", PROMPT, "--components", "tokens", "--position", "13,-1"]) == 0
    assert f"wrote {tmp_path / 'a-1.svg'}" in capsys.readouterr().err and not (tmp_path / "a.svg").exists()
    assert ">handed</text>" in (tmp_path / "a-0.svg").read_text()
    assert main(["ledger", *start, "--prompt", PROMPT, "--kinds", "tokens,heads"]) == 0
    page = (tmp_path / "a.svg").read_text()
    assert ">handed</text>" in page and ">head</text>" in page and torch.is_grad_enabled()
