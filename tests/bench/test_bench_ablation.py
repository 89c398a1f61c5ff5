"""The race measures what it says: both ablations agree, attribution patching is a gradient, shares the library's."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from torch import Tensor, nn

from bench.baselines.fair_ablation import FairAblation
from bench.baselines.neuron_methods import FAIR, ONE_BY_ONE, OneAtATime, PublishedShares, Shares, methods
from bench.baselines.published import Published
from bench.core.agreement import top_overlap
from bench.core.questions import Question, demo_model, questions
from bench.report.page import report
from bench.studies.ablation.__main__ import main
from bench.studies.ablation.quality import mean_activations, quality
from depass_fast import DePass, Neurons
from depass_fast.demo.text import training_examples
from tests.support.family_models import build_model
from tests.support.models import random_ids

TARGET = 5
LAYERS = (0, 1, 2)


@functools.cache
def model(model_type: str = "llama", dtype: torch.dtype = torch.float64) -> nn.Module:
    made = build_model(model_type, num_key_value_heads=2)
    made.config._attn_implementation = "eager"
    return made.requires_grad_(False).to(dtype)


def prompt(length: int = 7) -> Tensor:
    return torch.tensor(random_ids(length))


def replacements(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"zero": torch.zeros(3, 48, dtype=dtype), "mean": torch.randn(3, 48, generator=generator).to(dtype)}


@pytest.mark.parametrize("batch", [1, 7, 48])
@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_fair_ablation_measures_the_same(model_type: str, kind: str, batch: int) -> None:
    values = replacements()[kind]
    expected = OneAtATime(model(model_type)).effects(prompt(), TARGET, LAYERS, values)
    actual = FairAblation(model(model_type), batch).effects(prompt(), TARGET, LAYERS, values)
    # 1e-5: transformers computes norms in float32, whatever the model's dtype
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    some = FairAblation(model(model_type), batch).effects(prompt(), TARGET, [1], values, neurons=[3, 40])
    torch.testing.assert_close(some[0], actual[1, [3, 40]])


def test_ablating_to_the_own_value_changes_nothing() -> None:
    clean = FairAblation(model()).clean(prompt(1), TARGET)
    own = torch.stack([act[0] for act in clean.activations])  # one position: one value per neuron
    for method in (OneAtATime(model()), FairAblation(model())):
        assert method.effects(prompt(1), TARGET, LAYERS, own).abs().max() <= 1e-6 * clean.logit.abs()
    assert clean.logit == pytest.approx(float(model()(prompt(1)[None]).logits[0, -1, TARGET]), rel=1e-6)


def test_best_batch_is_one_that_was_tried() -> None:
    fair = FairAblation(model(), batch=5)
    rates = fair.best_batch(prompt(), TARGET, grid=(4, 16, 1000))
    assert set(rates) == {4, 16}
    assert fair.batch == max(rates, key=rates.get)


def test_fair_ablation_refuses_other_families() -> None:
    other = copy.copy(model())
    other.config = copy.copy(other.config)
    other.config.model_type = "gemma"
    with pytest.raises(ValueError, match="model: 'gemma' is not one of llama, qwen2"):
        FairAblation(other)


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_attribution_patching_is_the_first_order_of_ablation(kind: str) -> None:
    """A small part ε of the way from the activation to its replacement moves the logit by ε times the estimate."""
    values, part = replacements()[kind], 1e-3
    patching = methods()["attribution patching"](model()).effects(prompt(), TARGET, LAYERS, values)
    alone = methods()["attribution patching"](model()).effects(prompt(), TARGET, [1], values)
    torch.testing.assert_close(alone[0], patching[1], rtol=1e-5, atol=1e-7)
    for layer in LAYERS:
        for neuron in (0, 17, 47):
            up, down = (_moved(layer, neuron, values[layer, neuron], sign * part) for sign in (1, -1))
            assert (down - up) / (2 * part) == pytest.approx(float(patching[layer, neuron]), rel=1e-3, abs=2e-4)


def _moved(layer: int, neuron: int, value: Tensor, part: float) -> float:
    def move(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        act = args[0].clone()
        act[..., neuron] += part * (value - act[..., neuron])
        return (act,)

    handle = model().model.layers[layer].mlp.down_proj.register_forward_pre_hook(move)
    try:
        with torch.no_grad():
            return float(model()(prompt()[None]).logits[0, -1, TARGET])
    finally:
        handle.remove()


@pytest.mark.parametrize("layers", [[1], [0, 1, 2]])
def test_shares_are_the_library_s(layers: list[int]) -> None:
    zero, small = replacements(torch.float32)["zero"], model(dtype=torch.float32)
    shares = Shares(small).effects(prompt(), TARGET, layers, zero)
    expected = [DePass(small).attribute(prompt(), Neurons(layer), TARGET).scores[:48] for layer in layers]
    torch.testing.assert_close(shares, torch.stack(expected))
    published = PublishedShares(small).effects(prompt(), TARGET, layers, zero)
    state = Published(small).neurons(prompt(), layers[0])
    torch.testing.assert_close(published[0], Published(small).score(state, -1, TARGET)[1:])


@pytest.mark.parametrize("name", [*methods()])
def test_every_method_leaves_the_model_as_it_was(name: str) -> None:
    small = model(dtype=torch.float32)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    scores = methods()[name](small).effects(prompt(), TARGET, [0, 2], replacements(torch.float32)["zero"])
    assert scores.shape == (2, 48)
    assert scores.isfinite().all()
    assert not scores.requires_grad
    # transformers hooks modules of its own account; these it leaves alone
    assert not any(layer.mlp.down_proj._forward_pre_hooks for layer in small.model.layers)
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


def test_overlaps_are_by_magnitude() -> None:
    a, b = torch.arange(300.0), torch.arange(300.0)
    b[[0, 297]] = -400.0  # by magnitude: 299, 298, 297 against 0, 297 and 299
    assert top_overlap(a, b) == pytest.approx(2 / 3)
    assert top_overlap(a[:5], b[:5]) in (0.0, 1.0)  # at least one


def test_questions_are_half_indirect_objects_half_facts() -> None:
    demo, tokenizer = demo_model()
    asked = questions(tokenizer, 4)
    assert [tokenizer.decode([q.target]) in q.text for q in asked] == [True, True, False, False]
    assert mean_activations(demo, tokenizer, texts=2).shape == (6, 512)


def test_mean_activations_are_those_of_the_model_s_own_forward_pass() -> None:
    """Observing one layer leaves the activations of the later ones as they are."""
    demo, tokenizer = demo_model()
    means = mean_activations(demo, tokenizer, texts=1)
    example = next(training_examples(0, tokenizer.eos_token))
    ids = torch.tensor(tokenizer("".join(text for text, _ in example))["input_ids"])
    expected = torch.stack([act[1:].mean(0) for act in FairAblation(demo).clean(ids, TARGET).activations])
    torch.testing.assert_close(means, expected, rtol=1e-3, atol=1e-3)


def test_quality_judges_by_the_measured_effect() -> None:
    """A method that says the opposite of what is measured is perfectly wrong; of either kind of ablation."""

    class Opposite(FairAblation):
        def effects(self, *args, **kwargs) -> Tensor:
            return -super().effects(*args, **kwargs)

    small, means = model(), replacements()["mean"]
    taking_part = {FAIR: FairAblation, ONE_BY_ONE: OneAtATime, "opposite": Opposite}
    found = quality(small, [Question("", prompt(), TARGET)], taking_part, means)
    assert list(found) == ["opposite"]
    assert found["opposite"]["zero"]["spearman"]["all"]["median"] == pytest.approx(-1)
    assert found["opposite"]["zero"]["top1_overlap"]["layers"][2]["median"] == 1
    assert found["opposite"]["mean"]["spearman"]["all"]["median"] > -1  # the scores stay those of zero-ablation


def test_the_race_at_scale_says_what_it_scaled_up(tmp_path, capsys):
    path = tmp_path / "scale.json"
    main(["--scale", "llama-tiny", "--length", "5", "--runs", "1", "--sample", "4", "--out", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert {(row["provider"], row["workload"]) for row in rows} == {
        (name, f"neurons of {where}") for name in methods() for where in ("layer 0", "all layers")
    }
    measured = {(row["provider"], row["workload"]) for row in rows if row["scaled"] is None}
    sweeps = ("attribution patching", "depass_fast, adjoint", "depass_fast, linear adjoint")
    assert {name for name, workload in measured if workload == "neurons of all layers"} == set(sweeps)
    one, fair = (
        {r["workload"]: r for r in rows if r["provider"] == name} for name in ("one at a time", "fair ablation")
    )
    assert one["neurons of all layers"]["seconds"] > 2 * one["neurons of layer 0"]["seconds"]
    assert fair["neurons of all layers"]["sample"] == 96
    page = report([json.loads(path.read_text())])
    assert "Race of neurons at scale" in page and "| 4 neurons; forward passes |" in page
