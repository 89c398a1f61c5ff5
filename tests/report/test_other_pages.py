"""Pages of ledgers and of attention, and a report of a model of which it does not know all: numbers, and a browser."""

import numpy as np
import pytest
import torch

from depass_fast import Contrast, DePass, Heads, Tokens, write_html
from depass_fast.cli.main import main
from tests.support.family_models import available, build_variant
from tests.support.pages import (
    PROMPT,
    SPLIT,
    TARGET,
    data_of,
    demo,
    needs_pages,
    saved,
    sums_of,
    units,
    view_of,
    with_tokens,
)

pytestmark = needs_pages


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Each page's path, and what it was made of."""
    folder, dp = tmp_path_factory.mktemp("pages"), demo()
    made = {
        "ledger": dp.ledger(PROMPT, [TARGET, " Grace"], position=[-1, 5], attention=True),
        "why": dp.explain_attention(PROMPT, Tokens(), 1, [0, 5]),
        "pair": dp.explain_attention(PROMPT, Heads(1), 3, 0, key=(2, 4)),
        "credit": dp.attention_credit(PROMPT, Heads(1), Contrast(TARGET, " Grace")),
    }
    for name, one in made.items():
        one.to_html(folder / f"{name}.html")
    return {name: (folder / f"{name}.html", one) for name, one in made.items()}


def assert_sums(path):
    sheets = data_of(path)["sheets"]
    for sheet in sheets:
        for what, added, total in sums_of(sheet):
            assert added == total, (sheet["name"], what)
    return sheets


def test_a_ledger_has_a_sheet_for_every_target_of_both_books(pages):
    path, book = pages["ledger"]
    sheets = assert_sums(path)
    assert len(sheets) == 8 and len({sheet["name"] for sheet in sheets}) == 8 and path.stat().st_size < 1_500_000
    for number, sheet in enumerate(sheets):
        which = book.steered if number >= 4 else book
        states = [which.tokens(layer)[number % 4 // 2].scores_of(number % 2) for layer in range(6)]
        rows = view_of(sheet, "map")["parts"][0]["rows"]
        read = 14 if number % 4 < 2 else 6
        for row, state in zip(rows, states, strict=True):
            assert np.abs(np.array(row["cells"]) * sheet["unit"] - state[:read].numpy()).max() < 2 * sheet["unit"]
            if number < 4:
                assert row["total"] * sheet["unit"] == pytest.approx(sheet["value"], abs=1e-4)
        assert sum(len(group["rows"]) for group in view_of(sheet, "heads")["groups"]) == 48  # all of them
    assert book._repr_html_().count("<tr>") > 5 and "7 more" not in book._repr_html_()


def test_keys_sum_to_their_log_probabilities(pages):
    path, why = pages["why"]
    sheets = assert_sums(path)
    order = why.entropy.argsort().tolist()
    assert [sheet["name"].split(",")[0] for sheet in sheets] == [f"L1H{why.heads[n]}" for n in order]
    for sheet, n in zip(sheets, order, strict=True):
        groups = [group for group in view_of(sheet, "keys")["groups"] if group["key"] is not None]
        assert [group["p"] for group in groups] == sorted(why.probabilities[n].tolist(), reverse=True)
        for group in groups:
            wanted = np.log(group["p"]) + float(why.entropy[n])
            assert group["total"] * sheet["unit"] == pytest.approx(wanted, abs=1e-4)
            own = dict(zip(why.labels, why.log_probability(group["key"], why.heads[n]).tolist(), strict=True))
            assert all(own[label] == pytest.approx(units * sheet["unit"], abs=2e-5) for label, units in group["rows"])
        assert view_of(sheet, "tokens")["group"]["total"] == 1_000_000
    (sheet,) = assert_sums(pages["pair"][0])
    pair, first = pages["pair"][1], view_of(sheet, "keys")["groups"][0]
    assert first["total"] * sheet["unit"] == pytest.approx(float(pair.difference().sum()), abs=1e-5)
    assert sheet["value"] == pytest.approx(float(pair.scores[0] - pair.scores[1]), abs=1e-6)


def test_a_sharp_head_is_explained_by_the_log_ratio_to_its_second_key():
    """The log P + entropy of a key with nearly all of P is zero but for rounding."""
    why = demo().explain_attention(PROMPT, Tokens(), layer=0, head=0)
    (sheet,) = why.page_sheets()
    first, leading = view_of(sheet.plain(), "keys")["groups"][:2]
    one, other = why.probabilities.argsort(descending=True)[:2].tolist()
    assert sheet.what == "log ratio" and first["key"] is None and leading["key"] == why.keys[one]
    assert sheet.value == pytest.approx(float(why.scores[one] - why.scores[other])) and sheet.value > 3
    assert first["total"] * sheet.unit == pytest.approx(sheet.value, abs=1e-4)
    assert f"and not '{why.tokens[why.keys[other]]}'" in sheet.headline and "log ratio" in " ".join(sheet.notes)
    assert "+0.000000" not in why._repr_html_()


def test_heads_of_a_credit_add_up(pages):
    path, credit = pages["credit"]
    (sheet,) = assert_sums(path)
    heads = view_of(sheet, "heads")
    assert sum(group["total"] for group in heads["groups"]) * sheet["unit"] == pytest.approx(sheet["value"], abs=1e-4)
    label, change = credit.top_heads(1)[0]
    owed = heads["owed"][label]
    assert owed["total"] * sheet["unit"] == pytest.approx(change, abs=1e-5)
    assert sum(n for _, n in owed["rows"]) + owed["others"][1] + (owed["rest"] or 0) == owed["total"]
    shown = credit._repr_html_()
    assert "owed to where heads look" in shown and label in shown


def test_a_model_that_reports_do_not_know_in_full(tmp_path):
    """Gemma 4: what a ledger knows, with a note; nothing by position of heads and neurons."""
    name = "gemma4_text: experts, embeddings, shared values"
    if not available(name):
        pytest.skip("not in this version of transformers")
    report = DePass(build_variant(name)).report([3, 1, 4, 1, 5], 7)
    report.to_html(tmp_path / "page.html")
    (sheet,) = assert_sums(tmp_path / "page.html")
    assert any("is not shown" in note for note in sheet["notes"]) and sheet["error"] < 1e-4
    assert {view["id"] for view in sheet["views"]} == {"tokens", "map", "modules", "heads", "neurons", "all-tokens"}
    for row in view_of(sheet, "map")["parts"][0]["rows"]:
        assert row["total"] * sheet["unit"] == pytest.approx(sheet["value"], abs=1e-3 * max(1, abs(sheet["value"])))


def test_commands_write_these_pages_too(tmp_path, capsys):
    given = ["--model", "demo", "--prompt", "Nyria Morstam speaks", "--quiet", "--html", str(tmp_path / "page.html")]
    for command, count in (
        (["ledger", "--attention"], 2),
        (["attention", "--layer", "1", "--head", "0,3"], 2),
        (["attention", "--credit"], 1),
    ):
        assert main([*command, *given]) == 0 and "page.html" in capsys.readouterr().err
        assert len(data_of(tmp_path / "page.html")["sheets"]) == count


def test_a_page_invents_no_digits(visit, tmp_path):
    """Shares that are near zero have the decimals of their unit."""
    result = with_tokens(["a", " b", " c"])
    result.scores = torch.zeros_like(result.scores).index_fill(-1, torch.tensor([0]), 4e-5)
    result.to_html(tmp_path / "page.html")
    opened = visit(tmp_path / "page.html")
    shown = opened.locator('[data-table="all-tokens"] td.number').all_inner_texts()
    assert shown == ["+0.00004", "0.00000", "0.00000", "+0.00004"]


def test_clicks_in_a_ledger(visit, pages):
    opened = visit(pages["ledger"][0], "#sheet=0")
    opened.wait_for_selector('[data-grid="map-state"] svg')
    opened.locator('[data-grid="map-state"] svg .mark-rect path').nth(2 * 14 + 3).click()
    assert "layer=2" in opened.url and "position=3" in opened.url
    for kind in ("modules", "heads", "neurons"):
        names = opened.locator(f'[data-table="{kind}"] tbody tr th').all_inner_texts()
        assert names and all(name.startswith("L2") for name in names)
    opened.click("text=Clear all")
    opened.click('[data-table="modules"] button:has-text("L3.mlp")')
    assert "layer=3" in opened.url
    opened.click('[data-table="all-tokens"] button:has-text("Diane")')
    assert "position=2" in opened.url and "picked" in (
        opened.get_attribute('[data-table="all-tokens"] tbody tr', "class")
    )
    opened.locator("header select").focus()
    opened.select_option("header select", "4")
    assert opened.evaluate("document.activeElement.id") == "sheet"
    assert "credit of attention" in opened.inner_text(".facts")
    assert "from there on" in opened.inner_text("#view-map .sums")
    opened.locator('[aria-label="Filter neurons by name"]').press_sequentially("L4")
    assert "find.neurons=L4" in opened.url
    opened.reload()
    assert opened.input_value('[aria-label="Filter neurons by name"]') == "L4"


def test_clicks_in_an_explanation(visit, pages):
    path, _ = pages["why"]
    opened, sheet = visit(path), data_of(path)["sheets"][0]
    groups = {group["key"]: group for group in view_of(sheet, "keys")["groups"]}
    opened.wait_for_selector('[data-grid="keys-map"] svg')
    assert units(opened, '[data-table="keys"] .total .number') == [groups[None]["total"]]  # of a sharp head
    assert "−" not in opened.inner_text("#view-tokens .sum") and "+" not in opened.inner_text("#view-tokens .sum")
    opened.click('.token[data-position="3"]')
    assert units(opened, '[data-table="keys"] .total .number') == [groups[3]["total"]]
    assert float(opened.inner_text("#sum").replace("−", "-")) == pytest.approx(groups[3]["total"] * sheet["unit"])
    value = opened.inner_text("#value").replace("−", "-")
    assert float(value) == pytest.approx(groups[3]["value"], abs=sheet["unit"]) and "@3" in opened.inner_text(".facts")
    opened.locator('[data-grid="keys-map"] svg .mark-rect path').nth(5).click()
    assert "position=5" in opened.url and units(opened, '[data-table="keys"] .total .number') == [groups[5]["total"]]
    svg = saved(opened, '#view-keys .side [data-export="svg"]').decode()
    assert "each column sums to its log P + entropy" in svg and "completeness error" in svg
    grid = opened.locator('[data-grid="keys-map"]')
    grid.focus()
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Enter")
    assert "position=6" in opened.url


def test_clicks_in_a_credit(visit, pages):
    path, credit = pages["credit"]
    opened, (label, _) = visit(path), credit.top_heads(1)[0]
    (sheet,) = data_of(path)["sheets"]
    opened.click(f'[data-table="heads"] button:has-text("{label}")')
    owed = view_of(sheet, "heads")["owed"][label]
    assert units(opened, "#view-heads .details .total .number") == [owed["total"]] and f"head={label}" in opened.url
    opened.select_option('select[aria-label="Layer of the heads"]', "2")
    assert units(opened, '[data-table="heads"] .total .number') == [view_of(sheet, "heads")["groups"][0]["total"]]


@pytest.mark.parametrize("name", ["ledger", "why", "credit"])
def test_axe_finds_nothing(visit, pages, name):
    """Roles, names, landmarks and contrasts, by the checks of axe-core."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    opened = visit(pages[name][0], "#position=2&layer=2&head=L4H4", color_scheme="dark", bypass_csp=True)
    opened.wait_for_selector("[data-grid] svg")
    found = axe.Axe().run(opened).response["violations"]
    assert not found, [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]


def test_parts_of_characters_are_shown_as_characters(visit, tmp_path):
    result = with_tokens(SPLIT)
    write_html([result], tmp_path / "page.html")
    opened = visit(tmp_path / "page.html")
    shown = ["玛¹⁄₂", "玛²⁄₂", "和", "\\u200d¹⁄₂", "\\u200d²⁄₂", "⏎", "␣"]
    assert [text.strip() for text in opened.locator(".token .text").all_inner_texts()] == shown
    assert "the bytes <0x9B>" in opened.get_attribute('.token[data-position="1"]', "aria-label")
    rows = saved(opened, '[data-export="csv"]').decode()
    assert "'玛²⁄₂'@1" in rows and "<0x9B>" not in rows
    assert result.labels[1] == "'<0x9B>'@1"  # labels of the result are what they were
    assert "玛²⁄₂" in result._repr_html_()
