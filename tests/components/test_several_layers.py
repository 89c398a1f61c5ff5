"""Subspaces and dictionaries of several layers in one call: each layer gives what it gives by itself."""

import numpy as np
import pytest
import torch
from torch import nn

from depass_fast import DePass, Features, LayeredAttribution, Subspaces
from depass_fast.methods import layers as methods
from depass_fast.options import Adjoint
from depass_fast.planning import fit, planner
from tests.support.components import Dictionary
from tests.support.models import build, random_ids

IDS = random_ids(7, seed=4)
PROMPTS = [IDS, IDS[:3]]
EYE = torch.eye(32)
PAIR = [EYE[:, :3], EYE[:, 5]]
COMPLETE = [EYE[:, :20], EYE[:, 20:]]


def dictionaries(hook: str | None = None, count: int = 3, **changes) -> dict[int, Dictionary]:
    hooks = [None if hook is None else f"blocks.{layer}.{hook}" for layer in range(count)]
    return {layer: Dictionary(seed=layer, hook=hooks[layer], **changes) for layer in range(count)}


def perfect() -> Dictionary:
    """A dictionary that leaves nothing over."""
    sae = Dictionary(size=64)
    sae.W_enc = torch.cat([EYE, -EYE], dim=1)
    sae.W_dec, sae.b_dec, sae.b_enc = sae.W_enc.T.contiguous(), torch.zeros(32), torch.zeros(64)
    return sae


def same(together, alone):
    assert together.labels == alone.labels and together.layer == alone.layer
    assert together.target_ids == alone.target_ids and together.completeness_error <= 1e-5
    assert torch.allclose(together.scores, alone.scores, rtol=0, atol=1e-5 * float(alone.scores.abs().max()))


@pytest.fixture
def carried(monkeypatch):
    """The number of layers' states that were carried together, call by call."""
    found, carry = [], methods.carry_jointly
    monkeypatch.setattr(methods, "carry_jointly", lambda *given: found.append(len(given[2])) or carry(*given))
    return found


# -- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_all_layers_equal_each_by_itself(backend, carried):
    dp = build("llama-biases")
    trace, saes = dp.trace(PROMPTS), dictionaries()
    several = Subspaces(layers="all", bases=PAIR), Features(layers="all", sae=saes, site="resid_mid")
    single = lambda layer: Subspaces(layer, PAIR), lambda layer: Features(layer, saes[layer], "resid_mid")
    for kind, one in zip(several, single, strict=True):
        for p, found in enumerate(dp.attribute(trace, kind, [None, (3, 4)], backend=backend)):
            assert isinstance(found, LayeredAttribution) and found.layers == [0, 1, 2]
            for layer, result in enumerate(found):
                same(result, dp.attribute(trace, one(layer), [None, (3, 4)], backend=backend)[p])
    assert carried == ([] if backend == "reference" else [3, 3])


def test_bases_for_each_layer():
    dp, q = build("qwen2"), torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    each = [[q[:, 0]], [q[:, 1:4], q[:, 4]], [q[:, 5:]]]
    oracle = [dp.attribute(IDS, Subspaces(layer, bases)) for layer, bases in enumerate(each)]
    as_numpy = {np.int64(layer): [basis.numpy() for basis in bases] for layer, bases in enumerate(each)}
    for given in (each, dict(enumerate(each)), as_numpy, {-1: each[2], 0: q[:, 0], "blocks.1.hook_resid_pre": each[1]}):
        found = dp.attribute(IDS, Subspaces(layers="all", bases=given))
        assert found.labels[:3] == ["L0.subspace0", "L1.subspace0", "L1.subspace1"]
        for result, alone in zip(found, oracle, strict=True):
            same(result, alone)
    found = dp.attribute(IDS, Subspaces(layers=["blocks.1.hook_resid_post", 1], bases={1: each[1], 2: each[2]}))
    assert found.layers == [1, 2]
    same(found[2], oracle[2])


def test_labels_of_several_layers_differ():
    dp = build("llama-gqa")
    found = dp.attribute(IDS, Subspaces(layers=[0, 2], bases=PAIR, labels=["left", "probe"]))
    assert found.labels == ["L0.left", "L0.probe", "L2.left", "L2.probe"] and found.scores.shape == (2, 2)
    alone = dp.attribute(IDS, Subspaces(2, PAIR, ["left", "probe"]))
    assert found.score("L2.probe") == pytest.approx(alone.score("probe"), rel=1e-4)


def test_layers_with_and_without_rest_go_apart(carried):
    """A row of zeros for `rest` would take the shares of neurons that nobody drives."""
    dp, saes = build("llama-biases"), {0: perfect(), 1: Dictionary(), 2: perfect()}
    bases = {0: COMPLETE, 1: PAIR, 2: COMPLETE}
    for rule in ("softmax", "relu"):
        found = dp.attribute(PROMPTS, Subspaces(layers="all", bases=bases), 3, allocation=rule)
        assert [result.n_extras for result in found[0]] == [1, 2, 1]
        for p, whole in enumerate(found):
            for result in whole:
                alone = Subspaces(result.layer, bases[result.layer])
                same(result, dp.attribute(PROMPTS, alone, 3, allocation=rule)[p])
    whole = dp.attribute(IDS, Features(layers="all", sae=saes, site="resid_pre"), 3)
    for result in whole:
        same(result, dp.attribute(IDS, Features(result.layer, saes[result.layer], "resid_pre"), 3))
    assert carried == [1, 1, 1] * 3
    carried.clear()
    found = dp.attribute(IDS, Subspaces(layers="all", bases=COMPLETE))
    assert carried == [3] and torch.equal(found.rest, torch.zeros(3))


def test_bias_is_there_only_where_a_dictionary_has_one():
    dp = build("llama-gqa")
    saes = {0: Dictionary(), 1: Dictionary(normalise=True), 2: Dictionary(bias=0.0)}
    found = dp.attribute(PROMPTS, Features(layers="all", sae=saes, site="resid_post"), 3)
    for whole in found:
        assert [result.labels[-1] for result in whole] == ["bias", "rest", "rest"]
    for p in range(2):
        for result in found[p]:
            same(result, dp.attribute(PROMPTS, Features(result.layer, saes[result.layer], "resid_post"), 3)[p])
    with pytest.raises(ValueError, match="scores: no table, the layers have different numbers of components"):
        _ = found[0].scores


def test_an_end_a_position_verification_and_streaming():
    dp, saes = build("llama-gqa"), dictionaries("hook_resid_pre")
    probe = torch.randn(32, generator=torch.Generator().manual_seed(0))
    for kind, one in (
        (Subspaces(layers=[0, 1], bases=PAIR), lambda layer: Subspaces(layer, PAIR)),
        (Features(layers=[0, 1], sae=saes), lambda layer: Features(sae=saes[layer])),
    ):
        for result in dp.attribute(IDS, kind, probe, end=2, position=4):
            same(result, dp.attribute(IDS, one(result.layer), probe, end=2, position=4))
        for result in dp.attribute(IDS, kind, 3, stream=True):
            same(result, dp.attribute(IDS, one(result.layer), 3))
        assert dp.attribute(IDS, kind, 3, verify=True).verification.passed
    with pytest.raises(ValueError, match="end: 2 is out of range; these components reach layers 3 to 3"):
        dp.attribute(IDS, Features(layers=[0, 2], sae=dictionaries(), site="resid_post"), probe, end=2)


# -- the places of dictionaries ---------------------------------------------------------------------------------------


def test_dictionaries_say_their_layers():
    dp, saes = build("llama-gqa"), dictionaries("hook_resid_post")
    oracle = dp.attribute(IDS, Features(layers="all", sae=saes), 3)
    assert all(result.labels[0].startswith(f"L{result.layer}F") for result in oracle)
    by_hook = {f"blocks.{layer}.hook_resid_post": Dictionary(seed=layer) for layer in saes}
    modules = nn.ModuleList()  # iterated like a list
    for given in (list(saes.values()), [saes[2], saes[0], saes[1]], by_hook, tuple(saes.values())):
        for result, other in zip(dp.attribute(IDS, Features(layers="all", sae=given), 3), oracle, strict=True):
            same(result, other)
    some = dp.attribute(IDS, Features(layers=[2, "blocks.0.hook_resid_post"], sae=[saes[2], saes[0]]), 3)
    assert some.layers == [0, 2]
    unnamed = Features(layers=[2, 0], sae=[Dictionary(seed=2), Dictionary(seed=0)], site="resid_post")
    for found in (some, dp.attribute(IDS, unnamed, 3)):
        for result in found:
            same(result, oracle[result.layer])
    everywhere = dp.attribute(IDS, Features(layers=[0, 1], sae=Dictionary(), site="resid_pre"), 3)
    same(everywhere[1], dp.attribute(IDS, Features(1, Dictionary(), "resid_pre"), 3))
    with pytest.raises(ValueError, match="sae: expected 3, one per layer, got 0"):
        dp.attribute(IDS, Features(layers="all", sae=modules, site="resid_pre"))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda s: Features(sae=s), TypeError, "sae: several dictionaries go with layers='all', or with a list"),
        (lambda s: Features(1, s, layers="all"), ValueError, "layer: give either layer or layers"),
        (lambda s: Features(layers="all", sae=s[0]), ValueError, "one dictionary for several layers, though it was"),
        (lambda s: Features(layers="all", sae={0: s[0], 2: s[2]}), ValueError, r"sae: nothing for layer 1;.*=\[0, 2\]"),
        (lambda s: Features(layers="all", sae=[s[0], s[2]]), ValueError, "sae: nothing for layer 1;"),
        (lambda s: Features(layers=[3], sae=s), ValueError, "layer: 3 is out of range; this model has layers 0 to 2"),
        (lambda s: Features(layers=[0], sae={**s, 7: s[0]}), ValueError, "layer: 7 is out of range"),
        (lambda s: Features(layers=[0], sae={**s, -3: s[0]}), ValueError, "sae: layer 0 is there twice"),
        (lambda s: Features(layers=[0, 1], sae=[s[0], s[0]]), ValueError, "two dictionaries were trained on 'blocks.0"),
        (lambda s: Features(layers="all", sae={**s, 1: None}), TypeError, r"sae\[1\]: expected a dictionary like SAE"),
        (lambda s: Features(layers="all"), TypeError, "sae: expected a dictionary like SAE Lens', got NoneType"),
        (
            lambda s: Features(layers="all", sae=[Dictionary()] * 2, site="resid_pre"),
            ValueError,
            "sae: expected 3, one",
        ),
        (lambda s: Features(layers="all", sae=dictionaries()), ValueError, "layer, site: the dictionary names no hook"),
        (lambda s: Features(layers=["blocks.1.hook_resid_pre"], sae=s), ValueError, "site: 'resid_post' is not 'hook"),
        (
            lambda s: Features(layers="all", sae={**s, 1: Dictionary(hook="blocks.1.hook_resid_mid")}),
            ValueError,
            r"name different outputs \(resid_post, resid_mid\); ask for each",
        ),
        (
            lambda s: Features(layers="all", sae={**s, 1: Dictionary(width=16, hook="blocks.1.hook_resid_post")}),
            ValueError,
            r"sae: its W_dec must have shape \(F, 32\), got \(24, 16\), at layer 1",
        ),
        (lambda s: Features(layers="most", sae=s), ValueError, "layers: 'most' is neither"),
        (lambda s: Features(layers=[], sae=s), ValueError, "layers: empty"),
        (lambda s: Subspaces(bases={0: PAIR}), TypeError, "bases: bases for each layer go with layers='all'"),
        (lambda s: Subspaces(bases=[PAIR, PAIR]), TypeError, "bases: bases for each layer go with layers='all'"),
        (lambda s: Subspaces(layers="all", bases={0: PAIR}), ValueError, r"bases: nothing for layer 1, 2;.*=\[0\]"),
        (lambda s: Subspaces(layers=[0, 1], bases=[PAIR]), ValueError, "bases: expected 2, one per layer, got 1"),
        (lambda s: Subspaces(layers=[0, 4], bases=PAIR), ValueError, "layer: 4 is out of range"),
        (
            lambda s: Subspaces(layers=[1], bases={1: [EYE[:5]]}),
            ValueError,
            r"bases\[1\]\[0\]: expected shape \(32, k\)",
        ),
        (
            lambda s: Subspaces(layers=[1], bases={1: [EYE[:, 0]] * 2}),
            ValueError,
            r"bases\[1\]\[0\] and bases\[1\]\[1\] ov",
        ),
        (
            lambda s: Subspaces(layers=[1], bases={1: EYE}),
            TypeError,
            r"bases\[1\]: expected a list of \(D, k\) matrices",
        ),
        (lambda s: Subspaces(layers="all"), ValueError, "bases: empty"),
        (
            lambda s: Subspaces(layers=[0, 1], bases=[PAIR, [EYE[0]]], labels=["a", "b"]),
            ValueError,
            "expected 1, one per",
        ),
        (lambda s: Subspaces(layers=[0, 1], bases=PAIR, labels="ab"), TypeError, "labels: expected a list of strings"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(make, error, message, monkeypatch):
    dp, saes = build("llama-gqa"), dictionaries("hook_resid_post")
    monkeypatch.setattr(dp.adapter.model, "forward", None)
    with pytest.raises(error, match=message):
        dp.attribute(IDS, make(saes))


@pytest.mark.parametrize("method", ["exact", "adjoint"])
def test_a_silent_dictionary_is_named_before_anything_is_carried(method, carried):
    dp, saes = build("llama-gqa"), dictionaries()
    saes[2].b_enc -= 1e6
    with pytest.raises(ValueError, match="sae: none of its 24 features is active in prompt 0 at layer 2"):
        dp.attribute(PROMPTS, Features(layers="all", sae=saes, site="resid_pre"), 3, method=method)
    assert not carried
    for call in (dp.decompose, lambda ids, kind: dp.start(dp.trace(ids), kind)):
        with pytest.raises(ValueError, match=r"layers: only attribute\(\) and plan\(\) take several layers"):
            call(IDS, Features(layers=[0], sae=saes, site="resid_pre"))


# -- adjoint, plans ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::depass_fast.ApproximationWarning")
@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
@pytest.mark.parametrize("refine", [0, 1000])  # none, or all of them: exact, given log Z
def test_the_sweep_of_all_dictionaries(site, refine):
    dp = build("llama-biases")
    trace, saes = dp.trace(PROMPTS), {0: Dictionary(), 1: perfect(), 2: Dictionary(normalise=True)}
    kind, method = Features(layers="all", sae=saes, site=site), Adjoint(refine=refine, sample=0)
    swept, exact = (dp.attribute(trace, kind, [3, (4, 5)], method=how) for how in (method, "exact"))
    for p, (found, expected) in enumerate(zip(swept, exact, strict=True)):
        assert (found.method, found.components, found.layers) == ("adjoint", "features", [0, 1, 2])
        for result, other in zip(found, expected, strict=True):
            assert result.labels == other.labels and result.completeness_error < 1e-5
            size = float(other.scores.abs().max())
            alone = dp.attribute(trace, Features(result.layer, saes[result.layer], site), [3, (4, 5)], method=method)[p]
            assert alone.labels == result.labels and torch.allclose(result.scores, alone.scores, atol=1e-5 * size)
            assert not refine or torch.allclose(result.scores, other.scores, atol=1e-3 * size)


@pytest.mark.filterwarnings("ignore::depass_fast.ApproximationWarning")
def test_many_features_of_several_layers_are_swept_by_default():
    dp = build("llama-gqa")
    few, many = dictionaries(), dictionaries(size=2000)
    for saes, layers, method in ((few, "all", "exact"), (many, "all", "adjoint"), (many, [1], "exact")):
        kind = Features(layers=layers, sae=saes, site="resid_post")
        assert dp.plan(9, kind, measure=False).method == method
        if saes is few:
            assert dp.attribute(IDS, kind, 3).method == method
    with pytest.raises(ValueError, match="method: 'adjoint' is for many fine-grained components"):
        dp.attribute(IDS, Subspaces(layers="all", bases=PAIR), method="adjoint")


def test_the_plan_of_all_layers_is_that_of_each_together():
    dp, saes = build("llama-gqa"), dictionaries()
    for whole, one in (
        (Subspaces(layers="all", bases=PAIR), lambda layer: Subspaces(layer, PAIR)),
        (Features(layers="all", sae=saes, site="resid_pre"), lambda layer: Features(layer, saes[layer], "resid_pre")),
    ):
        plan, each = dp.plan(9, whole), [dp.plan(9, one(layer)) for layer in range(3)]
        assert plan.flop == sum(x.flop for x in each) and plan.rows == sum(x.rows for x in each)
        assert plan.start_layers == 3 and plan.upper_bound
    trace = dp.trace(PROMPTS)
    for method in ("exact", "adjoint"):
        kind = Features(layers="all", sae=saes, site="resid_pre")
        before, after = (dp.plan(what, kind, method=method, measure=False) for what in (PROMPTS, trace))
        found = dp.attribute(trace, kind, 3)
        assert after.n_components == max(len(r.labels) for whole in found for r in whole) < before.n_components
        assert after.upper_bound


def test_what_cannot_fit_is_refused_before_anything_is_carried(monkeypatch, carried):
    dp, saes = DePass(build("llama-gqa").model), dictionaries(size=3000)
    kind, ids = Features(layers="all", sae=saes, site="resid_post"), random_ids(40)
    trace = dp.trace(ids)
    for place in (planner, fit):
        monkeypatch.setattr(place, "available", lambda device: 300_000)
    for method in ("exact", "adjoint"):
        with pytest.raises(MemoryError, match="features.*: needs"):
            dp.attribute(trace, kind, 7, method=method)
    assert not carried


def test_a_dictionary_is_read_twice_and_no_state_is_made_twice(monkeypatch):
    """Once to count what is active, before anything is carried, and once for the state."""
    dp, saes, calls = build("llama-gqa"), dictionaries(), []
    for sae in saes.values():
        monkeypatch.setattr(sae, "encode", lambda x, encode=sae.encode: calls.append(x) or encode(x), raising=False)
    trace, made, start = dp.trace(IDS), [], methods.start
    monkeypatch.setattr(methods, "start", lambda part: made.append(part.layer) or start(part))
    dp.attribute(trace, Features(layers="all", sae=saes, site="resid_post"), 3)
    assert len(calls) == 3 * 2 * 2  # for the activations, and for the decoder's offset
    assert made == [0, 1, 2]
