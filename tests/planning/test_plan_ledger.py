"""Plans of a way back under a linear rule: for a ledger, and for components of a kind; what cannot fit is refused."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import depass_fast.ledger.attention
import depass_fast.ledger.attribute
import depass_fast.ledger.batches
import depass_fast.ledger.mlp
import depass_fast.ledger.norms
from depass_fast import DePass, Features, Heads, Modules, Neurons, Tokens
from depass_fast.cli.main import main
from depass_fast.ledger.answers import wanted_of
from depass_fast.ledger.pages import Wanted
from depass_fast.options import LINEAR, Options
from depass_fast.planning import fit, ledger, planner
from depass_fast.planning.ledger import ledger_outlook
from depass_fast.planning.shapes import RunShape
from tests.support.components import Dictionary, custom
from tests.support.family_models import available, build_model, build_variant
from tests.support.models import build, random_ids

IDS = random_ids(40, seed=1)
KEPT = {"allocation": "half"}


@pytest.fixture(scope="module")
def wide() -> DePass:
    return DePass(build_model("llama", intermediate_size=2048, max_position_embeddings=512))


@pytest.fixture
def free(monkeypatch):
    def say(size):
        for place in (planner, fit):
            monkeypatch.setattr(place, "available", lambda device: size)

    return say


def shape_of(dp: DePass, kind=None, lengths=(40,), rule="half", **more) -> RunShape:
    options = dp.options.updated({"allocation": rule})
    return RunShape(dp.adapter, lengths, kind or Tokens(), options, method=LINEAR, is_ledger=kind is None, **more)


def test_the_plan_of_a_ledger_is_asked_for_by_its_name():
    dp = build("llama-gqa")
    plan, adapter = dp.plan(12, "ledger", measure=False), dp.adapter
    assert (plan.method, plan.components, plan.rows, plan.layers_passed) == ("adjoint", "ledger", 12, adapter.n_layers)
    assert "ledger of 3 layers" in str(plan) and plan.of("torch") is plan.of("adjoint") is plan.estimates[0]
    named = dp.plan(12, "ledger", allocation="shapley", measure=False)
    assert plan.to_dict() == named.to_dict() | {"available_bytes": plan.available_bytes}  # which changes by itself
    assert dp.plan(12, "ledger", allocation="taylor", measure=False).flop < plan.flop
    assert dp.plan(random_ids(12), "ledger", measure=False).rows == 12
    assert dp.plan(12, "ledger", n_targets=3, position=[3, -1], measure=False).rows == 2 * 3 * 12
    assert dp.plan(12, Tokens(), measure=False, **KEPT).method == "adjoint"
    assert dp.plan(12, Tokens(), method="exact", measure=False, **KEPT).method == "exact"
    taylor = dp.plan(12, "ledger", allocation="taylor", measure=False)
    assert dp.plan(12, "ledger", rule="taylor", measure=False).flop == taylor.flop != plan.flop
    assert DePass(dp.model, allocation="taylor").plan(12, "ledger", measure=False).flop == taylor.flop
    assert DePass(dp.model, allocation="relu").plan(12, "ledger", measure=False).flop == plan.flop
    with pytest.raises(TypeError, match="rule: it is the allocation of a ledger"):
        dp.plan(12, "ledger", rule="half", allocation="half", measure=False)
    with pytest.raises(ValueError, match="rule: it is of a plan of 'ledger'"):
        dp.plan(12, Tokens(), rule="half", measure=False)
    for more, message in (
        ({"allocation": "softmax"}, "allocation: 'softmax' is not linear"),
        ({"method": "exact"}, "method: a ledger is made by method='adjoint' alone"),
        ({"end": 1}, "end: a ledger is of a prompt"),
        ({"n_targets": 0}, "n_targets: 0 is out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            dp.plan(12, "ledger", measure=False, **more)


def test_it_is_planned_as_it_is_divided():
    """The planner cannot import the rooms that import it."""
    made = depass_fast.ledger
    assert made.attention._CPU_TILE == ledger.CPU_TILE and made.attention._GPU_TILE == ledger.GPU_TILE
    assert made.batches._SHORT == ledger.SHORT and made.mlp._HELD == ledger.HELD
    sizes = made.attribute.CPU_WORKSPACE, made.attribute.GPU_WORKSPACE, made.attribute._LEAST_WORKSPACE
    assert sizes == (ledger.CPU_WORKSPACE, ledger.GPU_WORKSPACE, ledger.LEAST_WORKSPACE)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt_neox"])
def test_what_is_kept_is_what_was_planned(name):
    dp = build(name) if name == "llama-gqa" else DePass(build_model(name))
    kinds = [Tokens(), Tokens(1), Heads(1), Neurons(0), Neurons(layers="all"), Modules(1), Modules(1, "mlp")]
    kinds += [Modules(1, "attention"), Features(1, Dictionary(size=12), "resid_mid"), custom(dp, IDS, site="resid_mid")]
    for kind in kinds:
        work, wanted = ledger_outlook(shape_of(dp, kind)).work, wanted_of(kind.each(dp.adapter), dp.adapter)
        assert Wanted(work.sites, work.neurons, work.heads, work.last) == wanted, kind
    book = dp.ledger([IDS, IDS[:9]], [5, 6], rule="half")
    work = ledger_outlook(shape_of(dp, lengths=(40, 9), gradients=2)).work
    pages = book._pages
    scores = [*pages.heads.values(), *(part for parts in pages.neurons.values() for part in parts)]
    assert work.kept == sum(x.numel() * x.element_size() for x in (*pages.gradients.values(), *scores))


@pytest.mark.skipif(not available("gemma3n_text"), reason="the installed transformers is too old")
def test_gradients_are_as_wide_as_the_streams_of_their_site():
    dp = DePass(build_variant("gemma3n_text"))
    work, book = ledger_outlook(shape_of(dp)).work, dp.ledger(IDS, 5, rule="half")
    assert work.middle != work.streams
    assert work.kept - sum(map(work._scores, work.passed)) == sum(4 * x.numel() for x in book._pages.gradients.values())


@pytest.mark.parametrize("rule", ["taylor", "shapley"])
def test_the_arithmetic_is_what_is_done(wide, rule):
    trace = wide.trace(IDS)
    for targets in ([7], [7, 8, 9]):
        with FlopCounterMode(display=False) as counted:
            wide.ledger(trace, targets, rule=rule)
        planned = wide.plan(trace, "ledger", allocation=rule, n_targets=len(targets), measure=False).flop
        assert 1 / 1.2 < planned / counted.get_total_flops() < 1.2


def test_more_of_anything_takes_more(wide):
    def peak(length=400, kind="ledger", **more):
        return wide.plan(length, kind, measure=False, **{**KEPT, **more}).of().peak_bytes

    assert peak(200) < peak() < peak(n_targets=3) and peak(memory_budget=1 << 20) < peak()
    assert peak(kind=Tokens()) < peak()


def test_what_cannot_fit_is_refused_before_any_work(wide, free, monkeypatch):
    prompt = random_ids(60, seed=2)
    shape = shape_of(wide, lengths=(60,), gradients=60)
    least = ledger_outlook(shape).least()
    monkeypatch.setattr(fit, "_SMALL", 0)
    free(least - 1)
    with monkeypatch.context() as patch:
        patch.setattr(wide.adapter.model, "forward", None)  # no work
        with pytest.raises(MemoryError, match=r"ledger: needs .* It fits with one target and one position at a time"):
            wide.ledger(prompt, list(range(60)), rule="half")
        free(least)
        with pytest.raises(MemoryError, match="ledger: needs .* one of these 3 prompts at a time"):
            wide.ledger([prompt] * 3, list(range(60)), rule="half")
        free(20_000)
        with pytest.raises(MemoryError, match="heads, adjoint: needs .*Take a shorter prompt"):
            wide.attribute(prompt, Heads(1), 7, **KEPT, method="adjoint")
    free(least)
    assert wide.ledger(prompt, list(range(60)), rule="half").completeness_error < 1e-5


def test_a_way_back_begins_with_the_workspace_that_there_is_room_for(wide, free, monkeypatch):
    prompt, given = random_ids(60, seed=2), []
    outlook = ledger_outlook(shape_of(wide, lengths=(60,)))
    walk = depass_fast.ledger.attribute.walk_back
    monkeypatch.setattr(
        depass_fast.ledger.attribute, "walk_back", lambda *all_of: given.append(all_of[8]) or walk(*all_of)
    )
    monkeypatch.setattr(fit, "_SMALL", 0)
    usual = wide.ledger(prompt, 7, rule="half").tokens().scores
    free(outlook.peak(1 << 21))
    found = wide.ledger(prompt, 7, rule="half").tokens().scores
    assert given[0] == ledger.CPU_WORKSPACE and given[1] < given[0]
    assert torch.allclose(found, usual, rtol=1e-4, atol=1e-5 * float(usual.abs().max()))


def test_attention_is_held_a_tile_at_a_time(wide):
    """No more than a tile grows with the square of the length of a prompt."""
    narrow = DePass(build_model("llama", max_position_embeddings=1 << 16))

    def beside(length):
        outlook = ledger_outlook(RunShape(narrow.adapter, [length], Tokens(), Options("half"), method=LINEAR))
        return outlook.peak(outlook.default_workspace)

    sizes = [beside(n) for n in (1 << 13, 1 << 14, 1 << 15)]
    assert sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0])


def test_the_command(capsys):
    given = ["plan", "--model", "demo", "--length", "40", "--gemm-tflops", "1"]
    assert main([*given, "--components", "ledger"]) == 0
    assert "ledger of 6 layers" in capsys.readouterr().out
    assert main([*given, "--components", "tokens", "--allocation", "half", "--json"]) == 0
    assert '"method": "adjoint"' in capsys.readouterr().out
    printed = []
    for more in (["--rule", "taylor", "--layer", "all"], ["--allocation", "taylor"], ["--rule", "half"]):
        assert main([*given, "--components", "ledger", *more, "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out)["flop"])
    assert printed[0] == printed[1] < printed[2]
    assert main([*given, "--components", "ledger", "--layer", "3"]) == 2
    assert "--layer: 3 cannot be planned by itself: a ledger is of all layers" in capsys.readouterr().err
    assert main([*given, "--components", "ledger", "--allocation", "relu"]) == 2
    assert "'relu' is not linear" in capsys.readouterr().err
