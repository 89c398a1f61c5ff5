"""Choices and typing in a page: the focus stays, the address holds them, and what no sheet has is not believed."""

from __future__ import annotations

import itertools

from tests.support.pages import LANGUAGES, data_of, demo, needs_pages, units, view_of, with_tokens

pytestmark = needs_pages
FOCUSED = "[document.activeElement.tagName, document.activeElement.innerText.split('\\n')[0]]"


def focused(opened) -> list[str]:
    return opened.evaluate(FOCUSED)


def addressed(opened, fragment: str) -> None:
    """Give an open page another address."""
    opened.evaluate(f"location.hash = {fragment!r}")
    opened.evaluate("new Promise((done) => setTimeout(done, 0))")


def chips(opened) -> list[str]:
    return opened.locator(".chips .chip").all_inner_texts()


def test_the_focus_stays_where_it_is(visit, report):
    opened = visit(report)
    box = opened.locator('[aria-label="Filter neurons by name"]')
    box.press_sequentially("L4N")
    assert box.input_value() == "L4N" and box.evaluate("(one) => one === document.activeElement")
    assert "find.neurons=L4N" in opened.url
    names = opened.locator('[data-table="neurons"] tbody .name').all_inner_texts()
    assert names and all(name.startswith("L4N") for name in names)

    row = opened.locator('[data-table="heads"] tbody .name').nth(1)
    name = row.inner_text()
    row.focus()
    opened.keyboard.press("Enter")
    assert f"head={name}" in opened.url and focused(opened) == ["BUTTON", name]
    opened.locator('[data-table="heads-at"] tbody .name').first.focus()
    opened.keyboard.press("Enter")
    assert "position=" in opened.url and focused(opened)[0] == "BUTTON"
    opened.locator(".chip").first.focus()
    opened.keyboard.press("Enter")
    assert "position=" not in opened.url and focused(opened) == ["BUTTON", f"head {name} ×"]
    opened.keyboard.press("Enter")
    assert not chips(opened) and opened.evaluate("document.activeElement.id") == "chosen"
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.closest('section').id") == "view-tokens"
    opened.locator(".token").first.focus()
    opened.keyboard.press("Enter")
    assert "position=0" in opened.url and len(chips(opened)) == 1
    opened.keyboard.press("Escape")
    assert "position" not in opened.url and not chips(opened)


def test_sums_are_of_the_rows_that_are_listed(visit, report):
    opened, sheet = visit(report), data_of(report)["sheets"][0]
    readers_of_a_head_add_up(opened, view_of(sheet, "neurons"))
    what_is_not_known_is_said(opened, view_of(sheet, "neurons"))
    what_rounding_leaves_is_not_shown(opened, sheet)


def readers_of_a_head_add_up(opened, neurons) -> None:
    wanted = {}
    for label, one in neurons["readings"].items():
        for writer, amount in one["writers"]:
            if writer in neurons["read_from"]:
                wanted.setdefault(writer, {})[label] = amount
    assert wanted.keys() == neurons["read_from"].keys()  # no head is read by others alone
    head = max(wanted, key=lambda name: len(wanted[name]))
    addressed(opened, f"#layer=3&part=attention&position=13&head={head}")
    count, total = neurons["read_from"][head]
    assert units(opened, '[data-table="neurons"] .total .number') == [total]
    others = units(opened, '[data-table="neurons"] .under .number')
    assert sum(wanted[head].values()) + sum(others) == total and bool(others) == (count > len(wanted[head]))
    line = opened.inner_text("#view-neurons > .sums")
    assert f"{len(wanted[head])} listed" in line and f"taken from {head}" in line and "ways" not in line
    assert opened.locator('[aria-label="Layer of the neurons"]').is_hidden()
    first = next(iter(wanted[head]))
    addressed(opened, f"#head={head}&find.neurons={first}")
    line = opened.inner_text("#view-neurons > .sums")
    assert "1 listed" in line and f"{len(wanted[head]) - 1} filtered out" in line


def what_is_not_known_is_said(opened, neurons) -> None:
    every = [label for group in neurons["groups"] for label, _ in group["rows"]]
    unread = next(label for label in every if label not in neurons["readings"])
    addressed(opened, f"#neuron={unread}")
    assert f"the {len(neurons['readings'])} leading neurons" in opened.inner_text("#view-neurons .details .note")
    assert f"of the first {len(neurons['readings'])}" in opened.inner_text("#view-neurons .lead")
    addressed(opened, f"#neuron={next(iter(neurons['readings']))}")
    assert not opened.locator("#view-neurons .details .note").count()


def what_rounding_leaves_is_not_shown(opened, sheet) -> None:
    heads, rows = view_of(sheet, "heads"), view_of(sheet, "map")["parts"][0]["rows"]
    left = {(row["layer"], n): cell for row in rows for n, cell in enumerate(row["cells"])}
    for label, entries in heads["places"].items():
        for n, amount in zip(entries[::2], entries[1::2], strict=True):
            left[int(label[1]), n] -= amount
    layer, n = max((at for at, amount in left.items() if amount), key=lambda at: abs(rows[at[0]]["cells"][at[1]]))
    addressed(opened, f"#layer={layer}&part=attention&position={n}")
    assert units(opened, '[data-table="heads"] .total .number') == [rows[layer]["cells"][n]]
    assert "others" not in opened.inner_text("#view-heads > .sums")


def test_addresses(visit, report):
    opened = visit(report, "#position=999&layer=99&part=x&head=L99H0&neuron=bogus&node=bogus&path=77&sheet=9")
    assert not chips(opened)
    unknown = {"position": "14", "layer": "6", "head": "L0H8", "part": "mlp", "sort.heads": "x:y"}
    for key, value in [*unknown.items(), ("layer", "")]:
        addressed(opened, f"#{key}={value}")
        assert not chips(opened), key
    addressed(opened, "#position=13&layer=5&part=mlp&head=L0H7")
    assert len(chips(opened)) == 4  # with that which clears all
    addressed(opened, "#layer=5&part=mlp")
    opened.locator('[data-table="heads"] tbody .name').first.click()  # its readers are of all layers
    assert "head=" in opened.url and "layer=" not in opened.url and "part=" not in opened.url
    addressed(opened, "")
    rows = opened.locator('[data-table="heads"] tbody tr')
    assert rows.count() == 12
    opened.click("#view-heads .side .more")
    assert rows.count() == 48 and "all.heads=1" in opened.url
    opened.locator('[data-table="heads"] tbody .name').nth(20).click()
    assert rows.count() == 48 and "head=" in opened.url
    addressed(opened, "#sort.heads=label%3Aascending")
    assert rows.count() == 12 and rows.first.locator("th").inner_text() == "L0H0"
    assert opened.get_attribute('[data-table="heads"] thead th', "aria-sort") == "ascending"


def test_maps_of_prompts_from_right_to_left(visit, tmp_path):
    page = demo().report(list(range(10, 49)), 7)
    page.sheets[0].tokens = (LANGUAGES["Arabic"] * 10)[:39]
    page.to_html(tmp_path / "page.html")
    opened = visit(tmp_path / "page.html")
    opened.wait_for_selector('[data-grid="map-attention"] svg')
    cells = opened.locator('[data-grid="map-attention"] svg .mark-rect path')
    assert cells.nth(0).bounding_box()["x"] > cells.nth(3).bounding_box()["x"]
    texts = opened.locator('[data-grid="map-attention"] svg text:not([opacity="0"])', has_text="@")
    boxes = sorted(texts.nth(n).bounding_box()["x"] for n in range(texts.count()))
    assert len(boxes) > 15 and min(b - a for a, b in itertools.pairwise(boxes)) > 13  # no label touches another
    grid = opened.locator('[data-grid="map-attention"]')
    said = opened.locator(f"#{grid.get_attribute('aria-activedescendant')}")
    grid.focus()
    opened.keyboard.press("Home")
    opened.keyboard.press("ArrowLeft")
    assert said.get_attribute("aria-colindex") == "2"
    opened.evaluate("document.querySelector('[data-grid=\"heads-map\"]').focus()")
    said = opened.locator(f"#{opened.get_attribute('[data-grid=heads-map]', 'aria-activedescendant')}")
    opened.keyboard.press("Home")
    opened.keyboard.press("ArrowRight")
    assert said.get_attribute("aria-colindex") == "2"  # heads have no direction


def test_counts_and_line_breaks(visit, tmp_path):
    with_tokens(["\n"]).to_html(tmp_path / "page.html")
    opened = visit(tmp_path / "page.html")
    assert opened.inner_text("h1") == "'⏎'" and "'⏎'" in opened.inner_text("header .lead")
    assert "1 token " in opened.inner_text("#view-tokens .sum")
