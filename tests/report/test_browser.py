"""Pages in a real browser, by Playwright with the system's Chromium: clicks, keys, exports, languages, no network."""

from __future__ import annotations

import csv
import io
import re
import struct

import pytest

from depass_fast import DePass, Neurons, write_html
from tests.support.family_models import build_model
from tests.support.models import random_ids
from tests.support.pages import (
    HOSTILE,
    LANGUAGES,
    PROMPT,
    TARGET,
    data_of,
    demo,
    needs_pages,
    saved,
    units,
    view_of,
    with_tokens,
)

pytestmark = needs_pages


def test_clicks_filter_what_follows_and_sums_stay_in_view(visit, report):
    opened, sheet = visit(report), data_of(report)["sheets"][0]
    assert opened.inner_text("#sum") == opened.inner_text("#value") == f"{sheet['value']:.5f}"
    assert float(opened.inner_text("#error")) == pytest.approx(sheet["error"], rel=0.06)
    opened.click('.token[data-position="12"]')
    assert "position=12" in opened.url and "at position 12" in opened.inner_text("#view-heads .note")
    opened.wait_for_selector('[data-grid="map-attention"] svg')
    opened.locator('[data-grid="map-mlp"]').focus()
    box = opened.locator('[data-grid="map-attention"] svg .mark-rect path').nth(14 * 2 + 13)
    box.hover()
    opened.wait_for_selector("#vg-tooltip-element.visible")
    assert "Attention of layer 2" in opened.inner_text("#vg-tooltip-element")
    box.click()
    assert "layer=2" in opened.url and "part=attention" in opened.url and "position=13" in opened.url
    row = view_of(sheet, "map")["parts"][0]["rows"][2]
    assert units(opened, '[data-table="heads"] .total .number') == [row["cells"][13]]
    names = opened.locator('[data-table="heads"] tbody .name').all_inner_texts()
    assert names and all(name.startswith("L2H") for name in names)
    assert sum(row["cells"]) + row["rest"] + (row["bias"] or 0) + row["others"][1] == row["total"]
    opened.click(f'[data-table="heads"] button:has-text("{names[0]}")')
    assert f"head={names[0]}" in opened.url
    assert opened.inner_text("#view-heads .details h3") == names[0]
    total = dict(view_of(sheet, "heads")["groups"][2]["rows"])[names[0]]
    assert units(opened, "#view-heads .details .total .number") == [total, total]
    assert f"read {names[0]} directly" in opened.inner_text("#view-neurons .note")
    opened.click("text=Clear all")
    neuron = opened.locator('[data-table="neurons"] tbody .name').first.inner_text()
    opened.click(f'[data-table="neurons"] button:has-text("{neuron}")')
    assert "Reads at" in opened.inner_text("#view-neurons .details") and f"neuron={neuron}" in opened.url
    opened.select_option('select[aria-label="Layer of the neurons"]', "3")
    group = view_of(sheet, "neurons")["groups"][3]
    assert units(opened, '[data-table="neurons"] .total .number') == [group["total"]]
    assert opened.locator("#view-neurons > .sums [data-sum]").get_attribute("data-sum") == str(group["total"])


def test_tables_sort_filter_and_are_saved(visit, report):
    opened, sheet = visit(report, "#layer=4"), data_of(report)["sheets"][0]
    head = '[data-table="neurons"] thead th'
    assert [one.get_attribute("aria-sort") for one in opened.query_selector_all(head)] == ["none", "none", "descending"]

    def shares() -> list[float]:
        texts = opened.locator('[data-table="neurons"] tbody .number').all_inner_texts()
        return [float(text.replace("−", "-")) for text in texts]

    assert [abs(x) for x in shares()] == sorted((abs(x) for x in shares()), reverse=True)
    opened.click(f"{head}:nth-child(2) button")
    assert shares() == sorted(shares(), reverse=True) and "sort.neurons=share%3Adescending" in opened.url
    opened.click(f"{head}:nth-child(2) button")
    assert shares() == sorted(shares()) and opened.get_attribute(f"{head}:nth-child(2)", "aria-sort") == "ascending"
    rows = list(csv.reader(io.StringIO(saved(opened, '#view-neurons [data-export="csv"]').decode())))
    group = view_of(sheet, "neurons")["groups"][4]
    values = [round(float(share) / sheet["unit"]) for _, share in rows[1:]]
    assert rows[0] == ["label", "share"] and len(rows) == len(group["rows"]) + 4 and rows[-1][0] == "sum"
    assert sum(values[:-1]) == values[-1] == group["total"]
    opened.fill('[aria-label="Filter neurons by name"]', "L4N1")
    assert all("L4N1" in text for text in opened.locator('[data-table="neurons"] tbody .name').all_inner_texts())
    assert "filtered out" in opened.inner_text('[data-table="neurons"] tfoot')
    assert units(opened, '[data-table="neurons"] .total .number') == [group["total"]]


def test_pictures_hold_their_warnings(visit, tmp_path):
    write_html(with_tokens(["a", " b", " c"], warnings=["made <up>"]), tmp_path / "page.html")
    opened = visit(tmp_path / "page.html")
    assert "made <up>" in opened.inner_text(".warning")
    for card in ("tokens", "all-tokens"):
        svg = saved(opened, f'#view-{card} [data-export="svg"]').decode()
        assert svg.startswith("<svg") and "Warning: made &lt;up&gt;." in svg and "Attention is frozen" in svg, card
        assert "Exact; completeness error " in svg and "sum −12.67" in svg
        assert "Prompt: 'a b c'" in svg and "depass_fast 0" in svg and "/demo/" not in svg
    png = saved(opened, '.card [data-export="png"]')
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", png[16:24])) > 300


def test_bars_are_as_long_as_their_rows_and_grey_ones_are_cut(visit, tmp_path):
    """`rest` is larger than all neurons of one layer together."""
    demo().attribute(PROMPT, Neurons(layers=[2]), TARGET).to_html(tmp_path / "page.html")
    opened = visit(tmp_path / "page.html")
    svg = saved(opened, '#view-neurons [data-export="svg"]').decode()
    lengths = {"positive": [], "negative": [], "muted": []}
    for name, found in lengths.items():
        fill = opened.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
        bars = re.findall(rf'<path aria-label="[^"]*" role="[^"]*" [^>]*d="([^"]*)" fill="{fill}"', svg)
        found += [abs(float(re.findall(r"-?[0-9.]+", bar)[2])) for bar in bars]
    assert len(lengths["positive"]) + len(lengths["negative"]) == 30, svg[:3000]
    assert max(lengths["positive"] + lengths["negative"]) > 150
    assert "rest is what the residual stream holds without these" in opened.inner_text("#view-neurons .lead")
    shown = opened.inner_text("#view-neurons .sums")
    total, value = re.search(r"= sum (\S+)\s+logit (\S+)", shown).groups()
    assert ("the same in all digits" in shown) == (total == value) and "less than" not in shown
    assert "▶" in svg and "Grey bars with an arrow are longer" in svg


def test_the_map_is_saved(visit, report):
    opened = visit(report)
    opened.wait_for_selector('[data-grid="map-mlp"] svg')
    svg = saved(opened, '.map:has([data-grid="map-mlp"]) [data-export="svg"]').decode()
    assert "MLP: what it writes at every position" in svg and "Attention is frozen" in svg and svg.count("<path") > 84
    assert "' the'@6" in svg


def test_keys_reach_everything(visit, report):
    opened = visit(report)
    opened.wait_for_selector('[data-grid="map-attention"] svg')
    opened.locator(".token").first.focus()
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Enter")
    assert "position=2" in opened.url
    assert opened.get_attribute('.token[data-position="2"]', "aria-pressed") == "true"
    assert len(opened.query_selector_all('.token[tabindex="0"]')) == 1
    grid = opened.locator('[data-grid="map-attention"]')
    grid.focus()
    assert grid.get_attribute("aria-rowcount") == "6" and grid.get_attribute("aria-colcount") == "14"
    said = opened.locator(f"#{grid.get_attribute('aria-activedescendant')}")
    opened.keyboard.press("End")
    opened.keyboard.press("PageDown")
    opened.keyboard.press("ArrowUp")
    opened.keyboard.press("ArrowLeft")
    assert said.inner_text().startswith("Attention of layer 1, ' camera' at position 12, share")
    assert said.get_attribute("aria-colindex") == "13" and said.get_attribute("aria-selected") == "false"
    opened.keyboard.press("Enter")
    assert "layer=1" in opened.url and "position=12" in opened.url and said.get_attribute("aria-selected") == "true"
    opened.keyboard.press("Escape")
    assert "layer" not in opened.url
    opened.locator('[data-table="heads"] thead button').first.focus()
    opened.keyboard.press("Enter")
    assert opened.get_attribute('[data-table="heads"] thead th', "aria-sort") == "ascending"
    unnamed = opened.evaluate(
        """() => [...document.querySelectorAll('button, select, input, [tabindex="0"]')].filter((one) =>
        !(one.getAttribute('aria-label') || one.closest('label') || one.textContent.trim())).length"""
    )
    assert unnamed == 0


def test_the_hash_holds_the_view(visit, report):
    fragment = "#position=13&layer=3&part=mlp&head=L0H5&neuron=L4N145&sort.heads=label%3Aascending"
    opened = visit(report, fragment)
    assert opened.get_attribute('.token[data-position="13"]', "aria-pressed") == "true"
    assert opened.inner_text("#view-heads .details h3") == "L0H5"
    assert opened.inner_text("#view-neurons .details h3") == "L4N145"
    assert opened.get_attribute('[data-table="heads"] thead th', "aria-sort") == "ascending"
    before = opened.inner_text("main")
    opened.goto("about:blank")
    opened.goto(f"{report.as_uri()}{fragment}")
    opened.wait_for_selector("main")
    assert opened.inner_text("main") == before
    opened.evaluate("location.hash = '#layer=2&part=mlp'")
    opened.wait_for_function("document.querySelector('.chips').innerText.includes('2 mlp')")
    for wrong in ("#layer=99&position=x&sheet=7", "#layer=-1&head=<img>&neuron=%22"):
        opened.evaluate(f"location.hash = '{wrong}'")
        opened.reload()
        assert opened.inner_text("#sum")


def test_light_dark_and_narrow(visit, report):
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    light = visit(report)
    light.wait_for_selector('[data-grid="map-mlp"] svg')
    assert light.evaluate(ground) == "rgb(247, 246, 243)"
    light.emulate_media(color_scheme="dark")
    light.wait_for_function(f"{ground} === 'rgb(18, 19, 23)'")
    light.wait_for_selector('[data-grid="map-mlp"] svg')
    narrow = visit(report, viewport={"width": 400, "height": 800}, color_scheme="dark")
    narrow.wait_for_selector('[data-grid="map-mlp"] svg')
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize("language", LANGUAGES)
def test_languages(visit, tmp_path, language):
    words = LANGUAGES[language]
    with_tokens(words).to_html(tmp_path / "page.html")
    opened = visit(tmp_path / "page.html")
    assert [text.strip() for text in opened.locator(".token .text").all_inner_texts()] == [w.strip() for w in words]
    assert opened.get_attribute(".strip", "dir") == ("rtl" if language == "Arabic" else "ltr")
    first, second = (opened.locator(".token").nth(n).bounding_box()["x"] for n in (0, 1))
    assert (first > second) == (language == "Arabic")
    assert words[0] in saved(opened, '#view-tokens [data-export="svg"]').decode()
    assert words[1] in saved(opened, '[data-export="csv"]').decode()  # labels write the joiners of emoji as escapes
    ids = opened.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))


def test_hostile_tokens_are_text(visit, tmp_path):
    with_tokens(HOSTILE).to_html(tmp_path / "page.html")
    opened = visit(tmp_path / "page.html")
    shown = opened.locator(".token .text").all_inner_texts()
    assert shown[:5] == HOSTILE[:5] and shown[5:7] == ["\\u2028", "\\u2029"] and shown[-2:] == ["\\u0000", "⏎"]
    assert len(opened.query_selector_all("script")) == 3 and opened.query_selector("#page script, #page img") is None
    svg = saved(opened, '#view-tokens [data-export="svg"]').decode()
    assert "<script" not in svg and "&lt;script" in svg
    assert opened.evaluate("document.title").startswith("'<script>alert(1)</script>'")


def test_two_thousand_tokens(visit, tmp_path):
    dp = DePass(build_model("llama", num_key_value_heads=2, max_position_embeddings=2048))
    dp.report(random_ids(2000)).to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3e6
    opened = visit(tmp_path / "page.html", "#position=1500")
    opened.wait_for_selector('[data-grid="map-mlp"] svg')
    assert opened.locator(".token").count() == 2000
    columns = int(opened.get_attribute('[data-grid="map-mlp"]', "aria-colcount"))
    assert columns == 66  # the leading ones, that which was chosen, and the others
    opened.click('.token[data-position="1999"]')
    assert "position=1999" in opened.url


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit, report, scheme):
    """Roles, names, landmarks and contrasts, by the checks of axe-core."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    fragment = "#position=2&layer=0&part=attention&head=L0H5&neuron=L4N145"
    opened = visit(report, fragment, color_scheme=scheme, bypass_csp=True)
    opened.wait_for_selector('[data-grid="heads-map"] svg')
    found = axe.Axe().run(opened).response["violations"]
    assert not found, [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]


def test_without_scripts_the_leading_rows_are_there(visit, report):
    opened = visit(report, scripts=False)
    text = opened.inner_text("body")
    assert "' Diane' at position 13" in text and "camera" in text and "sum of the tokens' shares" in text
