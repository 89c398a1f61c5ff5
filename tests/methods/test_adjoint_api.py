"""The adjoint sweep as users meet it: which method runs, results of several layers, refinement, estimates, errors."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from depass_fast import Attribution, Custom, DePass, Features, Heads, LayeredAttribution, Neurons, Tokens
from depass_fast.adjoint import sweep
from depass_fast.adjoint.approximation import Approximation
from depass_fast.adjoint.estimate import Sample, draw, judge, spearman, warnings_of, wilson, worst
from depass_fast.adjoint.memory import CPU_BUDGET
from depass_fast.chosen_method import MOST_EXACT
from depass_fast.options import Adjoint
from tests.support.adjoint import assert_close
from tests.support.components import Dictionary, custom
from tests.support.family_models import build_model
from tests.support.models import build, random_ids

pytestmark = pytest.mark.filterwarnings("ignore::depass_fast.ApproximationWarning")
IDS = random_ids(6, seed=1)


@pytest.fixture(scope="module")
def wide() -> DePass:
    """More neurons than are propagated one by one by default."""
    return DePass(build_model("llama", intermediate_size=MOST_EXACT // 2, num_hidden_layers=3))


@pytest.fixture(params=["one", "several"])
def layered(request) -> LayeredAttribution:
    return build("qwen2").attribute(IDS, Neurons(layers=[2, 0]), 3 if request.param == "one" else [3, (4, 5)])


def test_which_method_runs(wide):
    dp = build("llama-gqa")
    assert dp.attribute(IDS, Neurons(0), 5).method == "exact"
    assert dp.attribute(IDS, Tokens(), 5).method == "exact"
    assert dp.attribute(IDS, Neurons(layers="all"), 5).method == "exact"  # 144 of them
    assert wide.attribute(IDS, Neurons(layers="all"), 5).method == "adjoint"  # 6144
    assert wide.attribute(IDS, Neurons(layers=[0, 1]), 5).method == "exact"  # 4096
    assert wide.attribute(IDS, Neurons(0), 5).method == "exact"  # one layer always is
    assert wide.attribute(IDS, Neurons(layers="all"), 5, allocation="relu").method == "exact"
    assert dp.attribute(IDS, Neurons(0), 5, method=Adjoint(refine=3)).method == "adjoint"
    assert dp.attribute(IDS, Neurons(0), 5, method="adjoint").method == "adjoint"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Neurons(0), {"method": "fast"}, "method: 'fast' is not one of"),
        (Tokens(), {"method": "adjoint"}, "tokens are few, for which 'exact' is cheap"),
        (Heads(0), {"method": "adjoint"}, "heads are few"),
        (Neurons(0), {"method": "adjoint", "allocation": "max"}, "with 'max' take method='exact'"),
        (Neurons(0), {"method": "adjoint", "allocation": "linear"}, "with 'linear' take method='exact'"),
        (Neurons(layers="some"), {}, "layers: 'some' is neither 'all' nor a list"),
        (Neurons(layers=[]), {}, "layers: empty"),
        (Neurons(layers=[0, 9]), {}, "layer: 9 is out of range"),
        (Neurons(layers="all"), {"end": 1, "target": torch.ones(32)}, "end: 1 is out of range"),
    ],
)
def test_errors_come_before_any_work(kind, options, message, monkeypatch):
    dp = build("llama-gqa")
    monkeypatch.setattr(dp.adapter.model, "forward", None)
    monkeypatch.setattr("depass_fast.request.capture", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        dp.attribute(IDS, kind, **options)


def test_a_sweeps_numbers_are_checked_when_they_are_given():
    for name in ("refine", "sample", "seed"):
        with pytest.raises(ValueError, match=f"{name}: -1 is out of range"):
            Adjoint(**{name: -1})
        with pytest.raises(TypeError, match=name):
            Adjoint(**{name: 1.5})
    with pytest.raises(ValueError, match="within: 'head' is not one of"):
        Adjoint(within="head")
    with pytest.raises(TypeError, match="unknown option 'refine'"):
        build("llama-gqa").attribute(IDS, Neurons(0), refine=3)


def test_only_attribute_takes_several_layers():
    dp = build("llama-gqa")
    with pytest.raises(ValueError, match="only attribute"):
        dp.decompose(IDS, Neurons(layers="all"))
    with pytest.raises(ValueError, match="only attribute"):
        dp.start(dp.trace(IDS), Neurons(layers=[0]))


def test_exact_layers_are_those_of_single_calls(layered):
    dp, several = build("qwen2"), len(layered.target_names) == 2
    assert layered.layers == [0, 2] and len(layered) == 2 and layered.method == "exact"
    for one in layered:
        single = dp.attribute(IDS, Neurons(one.layer), [3, (4, 5)] if several else 3)
        assert torch.allclose(one.scores, single.scores, atol=1e-5) and one.labels == single.labels
    assert layered.scores.shape == ((2, 2, 48) if several else (2, 48))
    assert layered.rest.shape == layered.bias.shape == ((2, 2) if several else (2,))
    assert layered[2] is layered.by_layer[1]
    total = layered.scores.sum(-1) + layered.rest + layered.bias
    assert torch.allclose(total, layered.target_logits[..., None].expand_as(total), atol=1e-4)
    assert 2 in layered and 1 not in layered
    with pytest.raises(KeyError, match="no layer 1; this result holds 0, 2"):
        layered[1]
    with pytest.raises(TypeError, match="a layer is named by its number, not by 'L2'; this result holds 0, 2"):
        layered["L2"]
    with pytest.raises(AttributeError, match=r"several layers; use .layers, or result\[2\]"):
        _ = layered.layer


def test_layered_results_have_the_interface_of_an_attribution(layered, tmp_path):
    best, value = layered.top(1)[0]
    named = (layered.scores if layered.scores.ndim == 2 else layered.scores[0]).flatten()  # of the first target
    assert best == layered.labels[int(named.abs().argmax())] and abs(value) == float(named.abs().max())
    assert layered.score(best) == value and len(layered.top(500)) == 96
    assert layered.top(1, by="positive")[0][1] == float(named.max())
    for bad, error in (
        ({"k": 0}, "k: 0 is out of range"),
        ({"by": "size"}, "by: 'size' is not one of"),
        ({"target": 7}, "target: 7 is out of range"),
    ):
        with pytest.raises((ValueError, IndexError), match=error):
            layered.top(**bad)
    with pytest.raises(KeyError, match="no component 'L1N0'"):
        layered.score("L1N0")
    path = tmp_path / "layers.safetensors"
    layered.save(path)
    for loaded in (Attribution.load(path), LayeredAttribution.load(path)):
        assert loaded.to_dict() == layered.to_dict() and torch.equal(loaded.scores, layered.scores)
    frame = layered.to_dataframe()
    assert list(frame.columns)[:2] == ["layer", "label"] and len(frame) == 2 * 49 + 1  # `bias` of layer 0
    layered.to_csv(tmp_path / "layers.csv")
    assert len((tmp_path / "layers.csv").read_text().splitlines()) == len(frame) + 1
    found = layered.to_dict()
    assert [one["layer"] for one in found["layers"]] == [0, 2] and found["method"] == "exact"
    assert "neurons at layers 0, 2 | exact" in str(layered)
    shared = ("tokens", "input_ids", "target_ids", "contrast_ids", "position", "allocation", "temperature", "backend")
    for name in (*shared, "device", "dtype", "memory_budget"):
        assert getattr(layered, name) == getattr(layered[0], name)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = layered.nothing_like_it


def test_saved_single_results_keep_method_and_estimate(tmp_path):
    result = build("llama-gqa").attribute(IDS, Neurons(0), 5, method=Adjoint(refine=4, sample=20))
    result.save(tmp_path / "r.safetensors")
    loaded = Attribution.load(tmp_path / "r.safetensors")
    assert (loaded.method, loaded.estimate, loaded.warnings) == ("adjoint", result.estimate, result.warnings)
    with pytest.raises(ValueError, match="not a saved attribution"):
        LayeredAttribution.load(tmp_path / "r.safetensors")


def test_prompts_as_a_batch_targets_of_their_own_and_positions():
    dp = build("mistral-window")
    prompts, options = [random_ids(5, 1), random_ids(1, 2), random_ids(8, 3)], {"method": Adjoint(refine=6)}
    together = dp.attribute(prompts, Neurons(layers="all"), targets=[3, (4, 5), 7], **options)
    for prompt, target, found in zip(prompts, [3, (4, 5), 7], together, strict=True):
        alone = dp.attribute(prompt, Neurons(layers="all"), target, **options)
        assert_close(found.scores.flatten(), alone.scores.flatten(), 1e-4)
    at_three = dp.attribute(prompts[2], Neurons(0), 7, position=3, **options)
    assert_close(at_three.scores, dp.attribute(prompts[2][:4], Neurons(0), 7, **options).scores, 1e-4)
    assert dp.attribute(dp.trace([prompts[0]]), Neurons(layers="all"), 3, **options)[0].position == 4


def test_several_targets_share_one_sweep():
    dp = build("llama-biases")
    together = dp.attribute(IDS, Neurons(0), [3, (4, 5), torch.ones(32)], method=Adjoint(refine=0, sample=0))
    for k, target in enumerate([3, (4, 5), torch.ones(32)]):
        alone = dp.attribute(IDS, Neurons(0), target, method=Adjoint(refine=0, sample=0))
        assert_close(together.scores[k], alone.scores, 1e-5)


def test_the_input_of_a_layer_as_the_end():
    dp, direction = build("qwen2"), torch.randn(32, generator=torch.Generator().manual_seed(1))
    for end in (1, 2):
        exact = dp.attribute(IDS, Neurons(0), direction, end=end)
        found = dp.attribute(IDS, Neurons(0), direction, end=end, method=Adjoint(refine=48))
        assert found.labels == exact.labels
        assert_close(found.scores, exact.scores, 1e-5 if end == 1 else 0.05)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
def test_custom_and_features(site):
    """Components of any kind; complete ones have no `rest`, as in an exact run."""
    dp = build("llama-biases")
    kinds = [custom(dp, IDS, site=site), Features(1, Dictionary(size=12), site)]
    trace = dp.trace(IDS)
    halves = trace.resid_at(1, site)[:, None] / 40
    kinds.append(Custom(1, halves.expand(-1, 40, -1).contiguous(), site=site))
    for kind in kinds:
        exact = dp.attribute(trace, kind, 5)
        found = dp.attribute(trace, kind, 5, method=Adjoint(refine=4))
        assert found.labels == exact.labels
        assert torch.corrcoef(torch.stack([found.scores, exact.scores]))[0, 1] > 0.98
    assert "rest" not in exact.labels


def refined_to_the_end(monkeypatch):
    """Let no refined component go back to the crowd where it is quiet."""
    monkeypatch.setattr("depass_fast.methods.adjoint.Approximation", partial(Approximation, quiet=0.0))


def test_refinement_overall_and_per_layer(monkeypatch):
    """Refined scores come nearer to exact; with all components refined to the end, nothing is left of the error."""
    dp = build("qwen3")
    exact = dp.attribute(IDS, Neurons(layers="all"), 5, method="exact").scores

    def error(**more) -> torch.Tensor:
        return (dp.attribute(IDS, Neurons(layers="all"), 5, method=Adjoint(sample=0, **more)).scores - exact).norm()

    rough = error(refine=0)
    assert error(refine=30) < rough and error(refine=10, within="layer") < rough
    assert error(refine=144) <= 1e-3 * exact.norm()
    refined_to_the_end(monkeypatch)
    assert error(refine=48, within="layer") <= 1e-5 * exact.norm()
    assert error(refine=144) <= 1e-5 * exact.norm()


def test_start_layers_in_groups_give_the_same(monkeypatch):
    dp = build("llama-gqa")
    options = {"method": Adjoint(refine=6, sample=12)}
    whole = dp.attribute(IDS, Neurons(layers="all"), 5, **options)
    groups = []
    inner = sweep.Sweep._groups
    monkeypatch.setattr(sweep.Sweep, "_groups", lambda self: groups.append(inner(self)) or groups[-1])
    parts = dp.attribute(IDS, Neurons(layers="all"), 5, memory_budget=1, **options)
    assert len(groups[-1]) == 3
    assert_close(parts.scores.flatten(), whole.scores.flatten(), 1e-5)


class Shortage(TorchDispatchMode):
    """Fails the ``at``-th operation on tensors, once."""

    def __init__(self, at, error):
        super().__init__()
        self.count, self.at, self.error = 0, at, error

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise self.error
        return function(*args, **(kwargs or {}))


def watched(monkeypatch, shortage):
    """Runs a sweep's attempts under ``shortage``, and lists their workspaces."""
    inner, workspaces = sweep.Sweep._attempt, []

    def attempt(self, method, workspace):
        workspaces.append(workspace)
        with shortage:
            return inner(self, method, workspace)

    monkeypatch.setattr(sweep.Sweep, "_attempt", attempt)
    return workspaces


@pytest.mark.parametrize("budget", [None, 1 << 20])
@pytest.mark.parametrize("rule", ["softmax", "taylor"])
def test_a_sweep_that_runs_out_of_memory_is_begun_again_with_half(rule, budget, monkeypatch):
    dp = build("llama-gqa")
    trace, options = dp.trace(IDS), {"method": "adjoint", "allocation": rule, "memory_budget": budget}

    def run(at):
        shortage = Shortage(at, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
        with monkeypatch.context() as patch:
            workspaces = watched(patch, shortage)
            return dp.attribute(trace, Neurons(layers="all"), 5, **options), workspaces, shortage.count

    expected, workspaces, total = run(-1)
    assert workspaces == [budget or CPU_BUDGET] and total > 100
    for at in (1, total // 3, 2 * total // 3, total):
        with pytest.warns(RuntimeWarning, match="carrying on with a workspace"):
            found, workspaces, _ = run(at)
        assert len(workspaces) == 2 and workspaces[1] == workspaces[0] // 2
        assert_close(found.scores.flatten(), expected.scores.flatten(), 1e-5)


def test_a_sweep_that_always_runs_out_of_memory_says_what_to_do(monkeypatch):
    dp, error = build("llama-gqa"), torch.OutOfMemoryError("CUDA out of memory")

    def fail(*_):
        raise error

    monkeypatch.setattr(sweep, "mean_field", fail)
    with pytest.warns(RuntimeWarning), pytest.raises(torch.OutOfMemoryError, match="one start layer"):
        dp.attribute(IDS, Neurons(layers="all"), 5, method="adjoint")
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        dp.attribute(IDS, Neurons(layers="all"), 5, method="adjoint")


def test_a_sweep_s_workspace_is_what_was_given_or_half_of_what_is_free(wide, monkeypatch):
    """Loud components, refinement and a sample: no score depends on it."""
    options = {"method": Adjoint(refine=6, sample=12), "temperature": 0.01}
    budgets, inner = [], sweep.mean_field
    monkeypatch.setattr(sweep, "mean_field", lambda *given: budgets.append(given[-1]) or inner(*given))
    whole = wide.attribute(IDS, Neurons(layers="all"), 5, **options)
    assert set(budgets) == {CPU_BUDGET // 5}
    for given in (1 << 24, 1 << 14):
        budgets.clear()
        found = wide.attribute(IDS, Neurons(layers="all"), 5, memory_budget=given, **options)
        assert set(budgets) == {given // 5}
        assert_close(found.scores.flatten(), whole.scores.flatten(), 1e-5)
    budgets.clear()
    monkeypatch.setattr(sweep, "available", lambda device: 1 << 20)
    found = wide.attribute(IDS, Neurons(layers="all"), 5, **options)
    assert set(budgets) == {(1 << 19) // 5}
    assert_close(found.scores.flatten(), whole.scores.flatten(), 1e-5)


def test_the_sample_is_drawn_by_the_seed(wide):
    def run(seed):
        return wide.attribute(IDS, Neurons(1), 5, method=Adjoint(refine=20, sample=40, seed=seed), temperature=0.5)

    assert run(1).estimate == run(1).estimate and torch.equal(run(1).scores, run(1).scores)
    assert run(1).estimate != run(2).estimate


def test_the_estimate_is_near_the_truth(wide):
    """The sample's figures against those of all components, propagated exactly."""
    options = {"temperature": 0.5}
    found = wide.attribute(IDS, Neurons(0), 5, method=Adjoint(refine=20, sample=400), **options)
    exact = wide.attribute(IDS, Neurons(0), 5, **options)
    mine, truth = found.scores[:-1], exact.scores[:-1]
    relative = float((mine - truth).norm() / truth.norm())
    assert found.estimate.relative_error == pytest.approx(relative, rel=1.0, abs=0.01)
    assert found.estimate.spearman == pytest.approx(spearman(mine, truth), abs=0.02)
    assert found.estimate.sample >= 200 and found.estimate.top == 20
    low, high = found.estimate.missed_interval
    bar = truth.abs().topk(20).values[-1]
    missed = int((truth.abs()[mine.abs().argsort(descending=True)[20:]] > bar).sum()) / 20
    assert low <= missed + 0.1 and missed <= high + 0.1


def test_spearman_and_intervals():
    x = torch.tensor([3.0, 1.0, 2.0, 2.0])
    assert spearman(x, x.exp()) == pytest.approx(1.0) and spearman(x, -x) == pytest.approx(-1.0)
    assert spearman(torch.zeros(4), torch.zeros(4)) == 1.0 and spearman(x, torch.zeros(4)) == 0.0
    low, high = wilson(0, 100)
    assert low == 0.0 and 0.03 < high < 0.04 and wilson(0, 0) == (0.0, 1.0)
    assert wilson(50, 100) == pytest.approx((0.404, 0.596), abs=1e-3)


def test_a_draw_that_misses_says_so():
    """The order of 1000 components is destroyed: most of the true top were not refined."""
    exact = torch.arange(1000.0, 0.0, -1.0)
    final = exact[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    refined = final.argsort(descending=True)[:20]
    left = torch.arange(1000)[~torch.isin(torch.arange(1000), refined)]
    final = final.clone()
    final[refined] = exact[refined]
    drawn = draw(final[left].abs(), left, 20, 400, torch.Generator().manual_seed(1))
    assert len(set(drawn.near.tolist())) == 80 and len(drawn.uniform) == 320
    figures = judge(final, exact, drawn, 20)
    assert figures.spearman < 0.3 and figures.relative_error > 0.3
    sample = Sample([figures], count=400, layers={3: 0.07, 4: 0.02})
    said = warnings_of(worst(sample, top=20, refined_error=None), 0.2)
    assert "miss the logit by 20.00%" in said[0] and len(said) == 3
    assert "the scores of layer 3 by 7% are off; refine more of every layer" in said[1]
    assert warnings_of(None, 0.0) == [] and len(warnings_of(None, 0.2)) == 1


def test_double_precision_and_streaming(monkeypatch):
    refined_to_the_end(monkeypatch)
    dp = build("llama-gqa", torch.float64)
    found = dp.attribute(IDS, Neurons(0), 3, method=Adjoint(refine=48, sample=0))
    assert torch.allclose(found.scores, dp.attribute(IDS, Neurons(0), 3).scores, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="stream: method='adjoint' holds no state"):
        dp.attribute(IDS, Neurons(0), 3, method="adjoint", stream=True)
