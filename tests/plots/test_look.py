"""The look of all pictures: colours that survive a grey print, words in any script, files that hold text."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="pictures need the extra plot")
from matplotlib import pyplot  # noqa: E402

from depass_fast.plots import SERIES, paper, save, signed_colours  # noqa: E402
from depass_fast.plots.bars import Bar, columns, rows  # noqa: E402
from depass_fast.plots.frame import Caption  # noqa: E402
from depass_fast.plots.heat import Table, heat  # noqa: E402
from depass_fast.plots.strip import strip  # noqa: E402
from depass_fast.plots.words import fitting  # noqa: E402

matplotlib.use("agg")
# of the severest colour blindness of each kind, for linear RGB (Machado, Oliveira and Fernandes 2009)
BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def lab(rgb, blindness=None):
    """CIELAB of sRGB colours (n, 3), as an eye with a colour blindness sees them."""
    rgb = np.asarray(rgb, dtype=float)[:, :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if blindness:
        linear = np.clip(linear @ np.array(BLIND[blindness]).T, 0, 1)
    x, y, z = np.cbrt(linear @ np.array(XYZ).T / [0.9505, 1.0, 1.089]).T  # above the linear part near black
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def test_colours_darken_evenly_on_both_sides_of_white():
    colours = signed_colours()(np.linspace(0, 1, 511))
    lightness = lab(colours)[:, 0]
    middle = 255
    assert lightness[middle] > 97 and (np.diff(lightness[: middle + 1]) > 0).all()
    assert (np.diff(lightness[middle:]) < 0).all()
    assert np.abs(lightness - lightness[::-1]).max() < 1, "scores of the same size are as dark, whatever their sign"
    assert lightness.min() < 42


@pytest.mark.parametrize("blindness", [None, *BLIND])
def test_signs_are_told_apart_by_every_eye(blindness):
    colours = lab(signed_colours()(np.linspace(0, 1, 21)), blindness)
    apart = np.linalg.norm(colours[:8] - colours[:12:-1], axis=1)  # from a third of the limit on
    assert apart.min() > 25, apart
    named = lab(np.array([matplotlib.colors.to_rgb(colour) for colour in SERIES[:2]]), blindness)
    assert np.linalg.norm(named[0] - named[1]) > 25


def test_terminals_and_pages_have_the_same_two_colours():
    from depass_fast.results.render import NEGATIVE, POSITIVE

    style = (Path(__file__).parents[2] / "depass_fast/report/page/style.css").read_text(encoding="utf-8")
    page = [re.findall(rf"--{name}-rgb: (.*);", style)[0].split(",") for name in ("negative", "positive")]
    hues = []
    for colours in (signed_colours()([0.1, 0.9]), np.array([NEGATIVE, POSITIVE]) / 255, np.array(page, float) / 255):
        _, a, b = lab(colours).T
        hues.append(np.degrees(np.arctan2(b, a)))
    assert np.abs(np.array(hues) - hues[0]).max() < 12, "degrees; red would be 25 away from orange"


def test_zero_is_white_and_negative_cells_are_marked():
    table = Table([[4.0, -2.0, 0.1, 9.0]], ["0"], ["a", "b", "c", "rest"], "layer", "head", extras=1)
    ax = heat(table, "share", Caption("a title"))
    (image,) = ax.images
    assert image.norm.vmin == -4 and image.norm.vmax == 4, "the extras do not set the limit"
    assert ax.figure.axes[1]._colorbar.extend == "max"
    shown = np.ma.filled(image.get_array(), np.nan)
    assert shown[0, :3].tolist() == [4.0, -2.0, 0.1] and np.isnan(shown[0, 3]) and shown[0, 4] == 9
    assert [list(line.get_xdata()) for line in ax.lines if line.get_marker() == "_"] == [[1], []]
    assert heat(table, "share", Caption(""), cmap="PuOr", limit=10.0).images[0].norm.vmax == 10
    with pytest.raises(ValueError, match="limit: -1"):
        heat(table, "share", Caption(""), limit=-1.0)


def test_bars_beyond_the_axis_are_cut_and_say_how_long_they_are():
    bars = [Bar("a", 1.0, "+1.0"), Bar("b", -0.5, "-0.5"), Bar("rest", 40.0, "+40.0", ranked=False)]
    ax = rows(bars, "share", Caption("a title", ["a note"], ["WARNING: beware"]))
    assert [patch.get_width() for patch in ax.patches] == [1.0, -0.5, 40.0]
    assert ax.get_xlim()[1] < 2 and [line.get_marker() for line in ax.lines if line.get_marker() == ">"] == [">"]
    texts = [text.get_text() for text in ax.texts]
    assert {"+1.0", "−0.5", "+40.0", "a note", "WARNING: beware"} == set(texts)
    assert ax.get_title(loc="left") == "a title"


def test_nothing_of_matplotlibs_settings_is_changed(tmp_path):
    before = dict(matplotlib.rcParams)
    save(columns([Bar("a", 1.0), Bar("b", -1.0)], "share", Caption("t")), tmp_path / "a.svg")
    with pytest.raises(RuntimeError, match="inside"), paper():
        raise RuntimeError("inside")
    assert dict(matplotlib.rcParams) == before


def test_a_backend_that_is_loaded_while_drawing_stays_interactive():
    matplotlib.interactive(False)
    with paper():
        matplotlib.interactive(True)  # as a notebook's does; else it would show the first picture alone
    assert matplotlib.is_interactive()
    matplotlib.interactive(False)


def test_what_no_font_holds_is_escaped(caplog):
    texts, families = fitting(["Ω \U0001f9a4 \t", "Привет", "plain"])
    assert texts[1:] == ["Привет", "plain"] and r"\t" in texts[0] and texts[0].startswith("Ω")
    assert ("\U0001f9a4" in texts[0]) == (len(families) > 1), "another font has the dodo, or nobody has"
    private = fitting(["\ue123"])[0]
    assert private == [r"\ue123"], "it is no character that can be printed"
    assert len(fitting(["x" * 50], 22)[0][0]) == 22
    assert not caplog.records


def test_another_font_helps_out(monkeypatch):
    with matplotlib.rc_context({"font.family": ["cmr10"]}):  # it has no Cyrillic
        texts, families = fitting(["Привет"])
    assert texts == ["Привет"] and families[0] == "cmr10" and len(families) == 2


@pytest.mark.parametrize("draw", ["rows", "strip"])
def test_tokens_of_any_kind_are_drawn_without_a_warning(draw, caplog):
    tokens = ["$x$", "_y", "日本", " مرحبا", "שלום", "नमस्ते", "\n", "<b>", "\\frac", "😀", "a" * 300, ""]
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        if draw == "rows":
            ax = rows([Bar(token, 1.0, "+1") for token in tokens], "share", Caption("$x$ and $y$", ["日本"]))
        else:
            ax = strip(tokens, [1.0] * len(tokens), "share", Caption("$x$"))
        ax.figure.draw_without_rendering()
    drawn = [text.get_text() for text in (*ax.get_yticklabels(), *ax.texts)]
    assert "$x$" in drawn and not caplog.records and max(map(len, drawn)) <= 60


def test_text_stays_text_in_files_and_files_are_the_same(tmp_path):
    def picture():
        return columns([Bar("Diane", 1.0), Bar("Grace", -1.0)], "share", Caption("a title"))

    for name in ("a.svg", "b.svg", "a.pdf"):
        save(picture() if name[0] == "a" else picture().figure, tmp_path / name)
    first = (tmp_path / "a.svg").read_text()
    assert ">Diane</text>" in first and first == (tmp_path / "b.svg").read_text()
    written = (tmp_path / "a.pdf").read_bytes()
    assert b"/FontFile2" in written and b"/Type3" not in written, "a TrueType font is embedded"
    assert b"/CreationDate" not in written
    with pytest.raises(ValueError, match="width: 'wide' is not one of 'column', 'page'"):
        rows([Bar("a", 1.0)], "share", Caption(""), width="wide")
    assert not pyplot.get_fignums() or pyplot.gcf().get_figwidth() == pytest.approx(3.3)


def test_two_thousand_tokens():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(2000).tolist()
    ax = columns([Bar(f"t{k}", score) for k, score in enumerate(scores)], "share", Caption("long"))
    (bars,) = ax.collections
    assert sum(path.vertices[1, 1] for path in bars.get_paths()) == pytest.approx(sum(scores))
    assert len(ax.get_xticks()) < 20 and 1 < len(ax.texts) <= 8, "the largest are named, as far as there is room"
    ax = strip([" token"] * 2000, scores, "share", Caption("long"))
    assert len(ax.texts) == 2000 and ax.figure.get_figheight() < 40


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder '.*no'; make it"):
        save(figure := pyplot.figure(), tmp_path / "no" / "picture.png")
    pyplot.close(figure)
