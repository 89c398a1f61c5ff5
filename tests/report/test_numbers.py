"""The numbers of a report: every view adds up to the target, and each number is what it says."""

import json

import numpy as np
import pytest
import torch

from depass_fast import Custom, DePass, Features, Heads, LogProb, Neurons
from depass_fast.report.fragment import _number
from depass_fast.report.page import page
from depass_fast.report.units import apportioned, group_of, leading, unit_of
from depass_fast.results.html import sheets_of
from tests.support.components import Dictionary
from tests.support.family_models import build_model
from tests.support.models import random_ids as few_ids
from tests.support.pages import PROMPT, TARGET, data_of, demo, needs_pages, sums_of, view_of
from tests.support.trained import smollm2


@pytest.mark.parametrize(
    ("units", "largest", "unit", "shown"),
    [
        (4, 7, 1e-5, "+0.00004"),
        (0, 7, 1e-5, "0.00000"),
        (-1, 70_000, 1e-3, "0.00"),
        (12_345, 12_345, 1e-3, "+12.35"),
        (0, 0, 1.0, "0"),
    ],
)
def test_numbers_have_no_more_digits_than_their_unit(units, largest, unit, shown):
    assert _number(units, largest, unit) == shown


@pytest.fixture(scope="module")
def made():
    trace = demo().trace(PROMPT)
    return trace, demo().report(trace, TARGET).sheets[0].plain()


def assert_adds_up(sheet):
    """Every sum is exact in units, and the target's value within the printed error."""
    found = list(sums_of(sheet))
    for what, added, total in found:
        assert added == total, what
    sizes = {what: total for what, _, total in found}
    scale = 2 * abs(sheet["value"]) + sum(abs(n) for _, n in view_of(sheet, "tokens")["group"]["rows"]) * sheet["unit"]
    for what, total in sizes.items():
        assert abs(total * sheet["unit"] - sheet["value"]) <= 8 * sheet["error"] * scale + sheet["unit"], what
    return found


def test_every_view_adds_up_to_the_logit(made):
    found = assert_adds_up(made[1])
    assert len(found) == 2 + 4 * 6  # tokens twice; attention, MLP, heads and neurons of six layers
    assert made[1]["error"] < 1e-5


def test_the_parts_of_a_cell_are_heads_and_neurons(made):
    """Heads at a position sum to the cell of attention there, neurons with their others to that of the MLP."""
    sheet = made[1]
    cells = {part["name"]: part["rows"] for part in view_of(sheet, "map")["parts"]}
    heads = view_of(sheet, "heads")
    for layer in range(6):
        total = np.zeros(14)
        for label, flat in heads["places"].items():
            if label.startswith(f"L{layer}H"):
                np.add.at(total, flat[::2], flat[1::2])
        assert np.abs(total - cells["attention"][layer]["cells"]).max() <= 6  # eight heads, each rounded by itself
    for group in heads["groups"]:
        for label, units in group["rows"]:
            for places in ("places", "sources"):
                assert abs(sum(heads[places].get(label, [0, 0])[1::2]) - units) <= 8, (places, label)


def test_cells_are_what_exact_propagation_gives(made):
    """A module's output at one position, carried through the network by itself."""
    trace, sheet = made
    cells = {part["name"]: part["rows"] for part in view_of(sheet, "map")["parts"]}
    for name, layer, position in (("attention", 1, 2), ("mlp", 0, 13), ("mlp", 3, 12)):
        record = trace.layers[layer]
        wrote = (
            record.resid_mid - record.resid_pre if name == "attention" else trace.resid(layer + 1) - record.resid_mid
        )
        state = torch.zeros(14, 1, wrote.shape[1])
        state[position, 0] = wrote[position]
        kind = Custom(layer, state, ["it"], "resid_mid" if name == "attention" else "resid_post")
        exact = demo().attribute(trace, kind, TARGET, allocation="shapley", method="exact").score("it")
        assert cells[name][layer]["cells"][position] * sheet["unit"] == pytest.approx(exact, abs=5e-5)


def test_a_head_carries_what_its_attention_takes_from_a_position(made):
    trace, sheet = made
    label, _ = max(
        (row for group in view_of(sheet, "heads")["groups"] for row in group["rows"]), key=lambda row: row[1]
    )
    layer, head = map(int, label[1:].split("H"))
    sources = view_of(sheet, "heads")["sources"][label]
    source = sources[::2][int(np.argmax(sources[1::2]))]
    model, block = demo().model, demo().model.model.layers[layer]
    model.set_attn_implementation("eager")
    try:
        p = model(trace.input_ids[None], output_attentions=True).attentions[layer][0, head]
    finally:
        model.set_attn_implementation("sdpa")
    d = block.self_attn.head_dim
    kv = head * model.config.num_key_value_heads // model.config.num_attention_heads
    value = block.self_attn.v_proj(block.input_layernorm(trace.layers[layer].resid_pre))[source, kv * d : kv * d + d]
    wrote = block.self_attn.o_proj.weight[:, head * d : head * d + d] @ value
    kind = Custom(layer, (p[:, source, None] * wrote)[:, None].detach(), ["it"], "resid_mid")
    exact = demo().attribute(trace, kind, TARGET, allocation="shapley", method="exact").score("it")
    assert max(sources[1::2]) * sheet["unit"] == pytest.approx(exact, abs=5e-5)


def test_a_neuron_reads_what_shapley_says(made):
    """The writers' shares by the rule's definition, with its mean by ten thousand steps."""
    trace, sheet = made
    table = view_of(sheet, "neurons")
    label, reading = next((one, r) for one, r in table["readings"].items() if one[1] in "345")
    layer, neuron = map(int, label[1:].split("N"))
    mlp, position = demo().model.model.layers[layer].mlp, reading["position"]
    x, norm = (
        trace.layers[layer].resid_mid[position].double(),
        demo().model.model.layers[layer].post_attention_layernorm,
    )
    s = (x.square().mean() + norm.variance_epsilon).rsqrt() * norm.weight.double()
    gate, up = (w.weight[neuron].detach().double() for w in (mlp.gate_proj, mlp.up_proj))
    g, u = (s * x) @ gate, (s * x) @ up
    act = torch.nn.functional.silu
    mean = act(g * torch.linspace(0, 1, 10_001).double()[1:] - g / 20_000).mean()
    for name, units in reading["writers"]:
        if name.startswith("L"):
            source = int(name[1])
            if ".mlp" not in name:
                continue
            wrote = (trace.resid(source + 1) - trace.layers[source].resid_mid)[position].double()
        else:
            wrote = trace.resid(0)[position].double()
        part = (s * wrote) @ gate * u * (act(g) - mean) / g + (s * wrote) @ up * mean
        share = float((part / (act(g) * u)).detach()) * reading["share"]
        assert units == pytest.approx(share, abs=3 + 1e-4 * abs(reading["share"])), name
    assert any(name.startswith("'") or ".mlp" in name for name, _ in reading["writers"])
    for one in table["readings"].values():
        assert sum(n for _, n in one["writers"]) + one["others"][1] + one["bias"] == one["share"]
        assert abs(one["bias"]) <= 3  # the model has no constants


@needs_pages
@pytest.mark.parametrize("name", ["olmo2", "gpt2", "qwen2_moe"])
def test_other_families(name):
    """Constants, experts and ungated MLPs; two targets at two positions have four sheets."""
    experts = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    dp = DePass(build_model(name, **(experts if name == "qwen2_moe" else {})))
    report = dp.report(few_ids(9, seed=1), [5, LogProb(7)], position=[-1, 4])
    assert len(report.sheets) == 4
    for sheet in report.sheets:
        assert_adds_up(sheet.plain())
    assert "bias" not in report.sheets[0].name and len(page(report.sheets)) < 1_600_000


@needs_pages
def test_a_trained_model(tmp_path):
    """SmolLM2 on indirect objects: all sums, from the file; the head that carries the name takes it from there."""
    report = DePass(*smollm2()).report("When Mary and John went to the store, John gave a drink to", " Mary")
    report.to_html(tmp_path / "why.html")
    (sheet,) = data_of(tmp_path / "why.html")["sheets"]
    found = assert_adds_up(sheet)
    assert len(found) == 2 + 4 * 30 and sheet["error"] < 1e-5
    sources = view_of(sheet, "heads")["sources"]["L23H0"]
    assert sheet["tokens"][sources[::2][int(np.argmax(sources[1::2]))]] == " Mary"
    assert (tmp_path / "why.html").stat().st_size < 3e6


def test_features_are_shown_too():
    features = Features(2, Dictionary(size=200, width=128), "resid_post")
    sheet = demo().report(PROMPT, TARGET, features=features).sheets[0].plain()
    assert_adds_up(sheet)
    (group,) = view_of(sheet, "features")["groups"]
    answer = demo().ledger(PROMPT, TARGET).scores(features)
    assert group["rest"] * sheet["unit"] == pytest.approx(answer.score("rest"), abs=2e-5)
    assert len(group["rows"]) + group["others"][0] == len(answer.labels) - answer.n_extras


@needs_pages
def test_simple_results_add_up():
    for kind in (Heads(layers="all"), Neurons(layers="all"), Neurons(2)):
        result = demo().attribute(PROMPT, kind, [TARGET, LogProb(TARGET)], allocation="shapley")
        text = page(_sheets(result))
        assert len(text) < 1_500_000
        for sheet in _sheets(result):
            plain = json.loads(json.dumps(sheet.plain()))
            for what, added, total in sums_of(plain):
                assert added == total, what
                if not what.startswith("tokens"):
                    assert (
                        abs(total * plain["unit"] - plain["value"]) <= 50 * plain["error"] * abs(plain["value"]) + 2e-5
                    )


def _sheets(result):
    return sheets_of(result)


def test_rounding_never_changes_a_sum():
    generator = np.random.default_rng(0)
    for size in (1, 2, 40, 3000):
        scores = generator.standard_cauchy(size)
        unit = unit_of(float(np.abs(scores).max()))
        kept = leading(np.abs(scores), 30)
        group = group_of([str(i) for i in range(size)], scores, unit, kept, rest=1.25, bias=None)
        assert group.added == group.total == round((scores.sum() + 1.25) / unit)
        assert group.others[0] == size - len(kept) and group.bias is None
        shown = np.array([number for _, number in group.rows])
        assert np.abs(shown - scores[kept] / unit).max() <= 1.5
    assert apportioned(np.array([0.4, 0.4, 0.4]), 1.0, 1).tolist() == [1, 0, 0]
    assert leading(np.array([1.0] * 30), 30, 0.5).tolist() == list(range(15))
    with pytest.raises(ValueError, match="NaN"):
        unit_of(float("nan"))
