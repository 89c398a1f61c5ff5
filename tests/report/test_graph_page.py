"""A graph as a page: its numbers add up, and in a real browser it is drawn, chosen from, saved and read."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from depass_fast import Contrast, DePass, Graph, Tokens, write_html
from depass_fast.cli.main import main
from depass_fast.graph import page as graph_page
from tests.support.family_models import build_model
from tests.support.models import random_ids
from tests.support.pages import HOSTILE, LANGUAGES, PROMPT, SPLIT, data_of, demo, needs_pages, saved, units, view_of

pytestmark = needs_pages
NODES = ".node path"


@lru_cache(maxsize=1)
def graph() -> Graph:
    return demo().graph(PROMPT, Contrast(" Diane", " Grace"), nodes=60)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("pages") / "graph.html"
    graph().to_html(found)
    return found


def called(tokens: list[str], **changes) -> Graph:
    """The graph of a prompt of as many tokens, that are called otherwise."""
    made = demo().graph(list(range(10, 10 + len(tokens))), 7, nodes=12)
    places = tuple(
        replace(place, label=f"{token!r}@{n}")
        for n, (place, token) in enumerate(zip(made.token_places, tokens, strict=True))
    )
    return replace(made, tokens=list(tokens), token_places=places, target_name=repr(tokens[0]), **changes)


def sums(view: dict) -> None:
    for read in view["reads"]:
        added = sum(read["from"][1::2]) + read["left"][1] + read["others"] + read["bias"]
        assert added == read["total"]
        assert read["total"] * read["unit"] == pytest.approx(read["activation"], abs=1e-5 * read["size"] + read["unit"])


# -- the data ------------------------------------------------------------------------------------------------------


def test_what_comes_into_a_node_adds_up(path):
    (sheet,) = data_of(path)["sheets"]
    view, names = view_of(sheet, "graph"), [node[0] for node in view_of(sheet, "graph")["nodes"]]
    sums(view)
    assert view["left"] == [0, 0] and len(view["nodes"]) == 1 + 14 + 60 and view["edges"] == len(graph().edges)
    for number in (0, 1, 40):
        name, read = names[number and view["first"] + number - 1], view["reads"][number]
        found = {edge.source: edge.weight for edge in graph().incoming(name)}
        for s, amount in zip(read["from"][::2], read["from"][1::2], strict=True):
            assert amount * read["unit"] == pytest.approx(found.pop(names[s]), abs=1.1 * read["unit"])
        assert all("others" in rest or abs(weight) < read["unit"] for rest, weight in found.items())
    assert [[names[i] for i in steps] for steps, _ in view["paths"][:5]] == [list(one.nodes) for one in graph().paths()]


def test_tokens_and_constants_sum_to_the_target():
    made = DePass(build_model("gpt2")).graph(random_ids(9), nodes=10)  # with biases everywhere
    tokens = sum(place.share for place in made.token_places)
    assert made.constants and tokens + made.constants == pytest.approx(made.activations[0], abs=1e-5)


def test_what_a_page_leaves_out_is_in_its_sums(monkeypatch):
    for name, few in {"NODES": 20, "TOKENS": 3, "EDGES": 150}.items():
        monkeypatch.setattr(graph_page, name, few)
    view = graph().sheets[0].views[1]
    sums(view)
    assert (
        view["left"][0] == 40 and view["first"] + 20 == len(view["nodes"]) and view["left"][1] == 14 - view["first"] + 1
    )
    assert sum(len(read["from"]) for read in view["reads"]) == 300 and any(read["left"][0] for read in view["reads"])


def test_every_node_has_a_place_of_its_own(path):
    view = view_of(data_of(path)["sheets"][0], "graph")
    places = [(x, y) for *_, x, y in view["nodes"]]
    assert len(set(places)) == len(places)
    for _, kind, layer, position, _, _, x, y in view["nodes"][1:]:
        (center, width) = next(rest for at, *rest in view["columns"] if at == position)
        assert abs(x - center) <= width / 2 and (y == -1 if kind == "token" else abs(y - layer) < 0.5)


def test_where_graphs_are_shown(tmp_path, capsys):
    shown = graph()._repr_html_()
    assert (
        shown
        and len(shown) < 8000
        and "<script" not in shown
        and "L0N107@13" in shown
        and "What the target reads" in shown
    )
    write_html([graph(), demo().attribute(PROMPT, Tokens())], tmp_path / "both.html")
    assert len(data_of(tmp_path / "both.html")["sheets"]) == 2
    given = ["--model", "demo", "--prompt", "Nyria Morstam speaks", "--target", " Italian", "--quiet"]
    assert main(["graph", *given, "--nodes", "9", "--html", str(tmp_path / "graph.html")]) == 0
    assert "graph.html" in capsys.readouterr().err
    assert main(["report", *given, "--graph", "8", "--out", str(tmp_path / "report.html")]) == 0
    for name, count in (("graph", 9), ("report", 8)):
        view = view_of(data_of(tmp_path / f"{name}.html")["sheets"][0], "graph")
        assert len(view["nodes"]) == view["first"] + count, name
        sums(view)
    assert main(["report", *given, "--graph", "--position", "0,1", "--out", str(tmp_path / "no.html")]) == 2
    with pytest.raises(ValueError, match="of one position"):
        demo().report(PROMPT, graph=True, position=[0, 1])
    for wrong, kind in ((0, ValueError), (-1, ValueError), (10**6, ValueError), ("x", TypeError), (2.5, TypeError)):
        with pytest.raises(kind, match="^graph: "):
            demo().report(PROMPT, graph=wrong)
    with pytest.raises(ValueError, match="of one target"):
        demo().report(PROMPT, [" a", " b"], graph=5)


# -- the browser ---------------------------------------------------------------------------------------------------


def drawn(opened):
    opened.wait_for_selector("[data-graph] svg .node")
    return opened


def test_a_click_shows_what_a_node_reads_and_who_reads_it(visit, path):
    opened, sheet = drawn(visit(path)), data_of(path)["sheets"][0]
    view = view_of(sheet, "graph")
    assert float(opened.inner_text("#sum")) == pytest.approx(sheet["value"], abs=5e-6)
    assert "others" in opened.inner_text('[data-table="graph-reads"] tfoot')
    number = next(i for i, node in enumerate(view["nodes"]) if node[0] == "L0N107@13")
    symbol = opened.locator(NODES).nth(opened.locator(NODES).count() - len(view["nodes"]) + number)
    symbol.hover()
    opened.wait_for_selector("#vg-tooltip-element.visible")
    tip = opened.inner_text("#vg-tooltip-element")
    assert "L0N107@13" in tip and "+12.77" in tip and "influence" in tip
    symbol.click()
    assert "node=L0N107%4013" in opened.url and opened.inner_text(".chosen h3") == "L0N107@13"
    read, share = view["reads"][number - view["first"] + 1], view["nodes"][number][4]
    assert units(opened, '[data-table="graph-reads"] .total .number') == [read["total"]]
    assert units(opened, '[data-table="graph-readers"] .total .number') == [share]
    assert opened.inner_text("#view-graph .sums").count("off by") == 1
    rows = list(csv.reader(io.StringIO(saved(opened, '#view-graph .side:first-child [data-export="csv"]').decode())))
    values = [round(float(one) / read["unit"]) for _, one in rows[1:]]
    assert sum(values[:-1]) == values[-1] == read["total"]
    rows = dict(csv.reader(io.StringIO(saved(opened, '#view-graph .side:nth-child(2) [data-export="csv"]').decode())))
    for edge in graph().outgoing("L0N107@13"):  # what of the share goes by way of each reader
        by = graph().node(edge.target)
        assert float(rows.pop(edge.target)) == pytest.approx(edge.weight * by.share / by.activation, abs=3e-6)
    assert set(rows) == {"label", "by way of others", "share"}
    opened.click('[data-table="graph-reads"] tbody .name')
    assert opened.inner_text(".chosen h3") == "L0H3@13" and "node=L0H3%4013" in opened.url
    opened.click(".chip")
    assert "node" not in opened.url and "Leading paths" in opened.inner_text("#view-graph")
    opened.locator(".path").first.focus()
    opened.keyboard.press("Enter")
    assert opened.evaluate("document.activeElement.className") == "path picked"
    assert "path=1" in opened.url and opened.get_attribute(".path", "aria-pressed") == "true"


def test_bars_have_the_colour_of_what_they_do_to_the_target(visit, path):
    view = view_of(data_of(path)["sheets"][0], "graph")
    node = next(
        node
        for read, node in zip(view["reads"][1:], view["nodes"][view["first"] :], strict=True)
        if node[1] == "neuron" and read["activation"] * node[4] < 0
    )
    opened = drawn(visit(path, f"#node={node[0].replace('@', '%40')}"))
    rows = opened.locator('[data-table="graph-reads"] tbody tr')
    for text, bar in zip(rows.locator(".number").all_inner_texts(), rows.locator(".bar span").all(), strict=True):
        assert bar.get_attribute("class") == ("negative" if text.startswith("+") else "positive")
    assert "Part of activation" in opened.inner_text('[data-table="graph-reads"] thead')
    assert "Share" in opened.inner_text('[data-table="graph-readers"] thead')
    assert "orange raises it, blue lowers it" in opened.inner_text("#view-graph .side:first-child")
    csv_text = saved(opened, '#view-graph .side:first-child [data-export="csv"]').decode()
    assert csv_text.startswith("label,part of activation")
    svg = saved(opened, '#view-graph .side:first-child [data-export="svg"]').decode()
    assert "part of activation" in svg and "orange raises it" in svg
    opened.click('[data-table="graph-reads"] tbody button:has-text("H")')  # a head's activation is its share
    assert "Share" in opened.inner_text('[data-table="graph-reads"] thead')


def test_parts_of_characters_are_shown_as_characters(visit, tmp_path):
    made = replace(called(SPLIT), target_name="' it'")
    made.to_html(tmp_path / "page.html")
    opened = drawn(visit(tmp_path / "page.html"))
    shown = opened.inner_text("#view-graph")
    assert "玛²⁄₂'@1" in shown and "⏎'@5" in shown and "<0x9B>" not in shown
    names = opened.locator("[data-graph] svg .mark-text text").all_text_contents()
    assert "玛²⁄₂" in names and "<0x9B>" not in names
    opened.fill('[aria-label="Filter nodes by name"]', "玛²")
    opened.click('[data-table="graph-nodes"] tbody button')
    assert opened.inner_text(".chosen h3") == "'玛²⁄₂'@1" and "'玛²⁄₂'@1" in opened.inner_text(".chip")
    assert opened.inner_text("#node-graph").startswith("'玛²⁄₂'@1, token")
    assert "'玛²⁄₂'@1 is read by" in opened.inner_text("#view-graph")
    assert "玛²⁄₂" in saved(opened, '#view-graph [data-export="svg"]').decode()
    assert "'玛²⁄₂'@1" in dict(made.sheets[0].views[1]["groups"][0]["rows"])


def test_the_strongest_edges_are_drawn(visit, path):
    opened = drawn(visit(path))
    opened.wait_for_function("document.querySelectorAll('.edge path').length === 150")
    opened.locator('[aria-label="Edges that are drawn"]').fill("0")
    opened.wait_for_function("document.querySelectorAll('.edge path').length === 10")
    assert "edges=10" in opened.url and "10 of 1,368 edges" in opened.inner_text(".controls")
    assert "band" not in saved(opened, '#view-graph [data-export="svg"]').decode()
    opened.evaluate("location.hash = '#edges=10&position=3'")
    opened.wait_for_function("document.querySelectorAll('.chip').length === 1")
    opened.select_option('[aria-label="What makes an edge strong"]', "share")
    assert "by=share" in opened.url and "Σ |share|" in opened.inner_text(".controls")
    svg = saved(opened, '#view-graph [data-export="svg"]').decode()
    assert "the band is position 3" in svg and f"Prompt: '&lt;s&gt;{PROMPT}'" in svg
    assert "10 of 1,368 edges" in svg and "Attention is frozen" in svg and "completeness error" in svg
    assert saved(opened, '#view-graph [data-export="png"]')[:8] == b"\x89PNG\r\n\x1a\n"


def test_keys_and_the_address(visit, path):
    fragment = "#node=L0H5%4013&edges=40&by=share"
    opened = drawn(visit(path, fragment))
    assert opened.inner_text(".chosen h3") == "L0H5@13" and "40 of" in opened.inner_text(".controls")
    box = opened.locator("[data-graph]")
    box.focus()
    said = opened.locator("#node-graph")
    assert said.inner_text().startswith("L0H5@13, head of layer 0")
    opened.keyboard.press("ArrowDown")
    assert said.inner_text().split(",")[1].strip() == "token" and said.get_attribute("aria-selected") == "false"
    opened.keyboard.press("Enter")
    assert "node=%27" in opened.url and "A token reads nothing" in opened.inner_text("#view-graph")
    opened.keyboard.press("ArrowUp")
    opened.keyboard.press("Home")
    assert said.inner_text().startswith("target, target")
    opened.keyboard.press("ArrowDown")
    assert "neuron of layer 5" in said.inner_text()
    opened.keyboard.press("Escape")
    assert "node" not in opened.url
    opened.evaluate("location.hash = '#node=<img>&edges=x&by=y&path=99'")
    opened.reload()
    assert "150 of" in drawn(opened).inner_text(".controls") and not opened.locator(".chip").count()


def test_hostile_tokens_and_warnings(visit, tmp_path):
    called(HOSTILE, warnings=["made <up>"]).to_html(tmp_path / "page.html")
    opened = drawn(visit(tmp_path / "page.html", color_scheme="dark", viewport={"width": 420, "height": 800}))
    assert len(opened.query_selector_all("script")) == 3 and opened.query_selector("#page script, #page img") is None
    opened.locator(NODES).last.hover()
    opened.wait_for_selector("#vg-tooltip-element.visible")
    opened.locator('[aria-label="Filter nodes by name"]').press_sequentially("alert")
    assert "find.nodes=alert" in opened.url
    opened.click('[data-table="graph-nodes"] button:has-text("alert")')
    assert "<script>alert(1)</script>" in opened.inner_text(".chosen h3")
    svg = saved(opened, '#view-graph [data-export="svg"]').decode()
    assert "<script" not in svg and "&lt;script" in svg and "Warning: made &lt;up&gt;." in svg
    assert opened.evaluate("document.documentElement.scrollWidth") <= 420


def test_a_long_graph_is_folded_and_opens_on_its_target(visit, tmp_path):
    """300 tokens, of which few have lines; at 400 pixels the columns that are left are wider than their box."""
    dp = DePass(build_model("llama", num_key_value_heads=2, max_position_embeddings=512))
    dp.graph(random_ids(300), nodes=200).to_html(tmp_path / "page.html")
    opened = drawn(visit(tmp_path / "page.html", viewport={"width": 400, "height": 800}))
    box, label = opened.locator("[data-graph]"), opened.locator("[data-graph] svg text", has_text="id ").last
    opened.wait_for_function("document.querySelector('[data-graph]').scrollLeft > 0")
    frame, at = box.bounding_box(), label.bounding_box()
    assert frame["x"] < at["x"] - 20 and at["x"] < frame["x"] + frame["width"]
    legend = opened.locator("#view-graph .picture").first.bounding_box()
    assert legend["x"] >= 0 and legend["x"] + legend["width"] <= 400
    assert opened.evaluate("document.documentElement.scrollWidth") <= 400
    texts = opened.locator("[data-graph] svg text").all_text_contents()
    gaps = [text for text in texts if text.startswith("…")]
    assert gaps and "…N stands for N tokens of which no line is drawn" in opened.inner_text("main")
    opened.fill('[aria-label="Filter nodes by name"]', "@7")
    chosen = opened.locator('[data-table="graph-nodes"] tbody .name').first
    name = chosen.inner_text()
    chosen.click()  # a token in a gap has a column then
    opened.wait_for_function(
        f"[...document.querySelectorAll('[data-graph] svg text')].some((one) => one.textContent === {name!r})"
    )


def test_from_right_to_left(visit, tmp_path):
    words = LANGUAGES["Arabic"]
    called(words).to_html(tmp_path / "page.html")
    opened = drawn(visit(tmp_path / "page.html"))
    first, last = (
        opened.locator("[data-graph] svg text", has_text=words[n].strip()).first.bounding_box() for n in (1, 3)
    )
    assert first["x"] > last["x"]


def test_axe_finds_nothing_in_a_graph(visit, path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    found = axe.Axe().run(drawn(visit(path, "#path=2", color_scheme="dark", bypass_csp=True))).response["violations"]
    assert not found, [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]
