"""Log-probabilities as targets: their direction, their sum, and one pass over the vocabulary for all of them."""

import json
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from depass_fast import (
    Adjoint,
    Attribution,
    Contrast,
    DePass,
    Heads,
    LayeredAttribution,
    LogProb,
    Neurons,
    Tokens,
)
from depass_fast.readout.collect import read_directions
from depass_fast.readout.log_probs import MeanToken
from depass_fast.request import Request, make_request, with_targets, with_trace
from tests.methods.test_continuation import frozen_direction, log_probs_of
from tests.methods.test_positions import same
from tests.support.components import kinds
from tests.support.family_models import build_model
from tests.support.models import build, random_ids

IDS = random_ids(6)
BATCH = [IDS, IDS[:3], random_ids(9, seed=5)]
ENDS = {  # what follows the final norm
    "plain": ("llama", {}),
    "scale": ("cohere", {"num_key_value_heads": 2, "logit_scale": 0.2}),
    "divided": ("granite", {"logits_scaling": 3.0}),
    "bias": ("phi", {"partial_rotary_factor": 0.5}),
    "projection": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
}


@pytest.fixture
def model():
    return build_model("llama", num_key_value_heads=2)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The number of places of every pass over the vocabulary."""
    found, at = [], MeanToken.at
    monkeypatch.setattr(MeanToken, "at", lambda *given: found.append(len(given[1])) or at(*given))
    return found


def traced_request(dp: DePass, prompt, target) -> Request:
    """The request of a call of `attribute`, in front of its readout."""
    return with_trace(with_targets(make_request(dp.adapter, None, dp.options, prompt, Tokens()), target))


def exact_log_probs(dp: DePass, position: int) -> torch.Tensor:
    """The log-probabilities (vocabulary,) at the traced hidden state of a float64 model, all of them in float64."""
    return dp.adapter.logits(dp.trace(IDS).normed_final[position]).log_softmax(-1).detach()


@pytest.mark.parametrize("end", ENDS)
def test_the_direction_is_the_gradient_of_the_log_probability(end, monkeypatch):
    monkeypatch.setattr("depass_fast.readout.log_probs._ELEMENTS", 32 * 7)  # several blocks of the vocabulary
    model_type, changes = ENDS[end]
    dp = DePass(build_model(model_type, **changes).double())
    found = dp.attribute(IDS, Heads(1), LogProb(5), position=3)
    gradient = dp.attribute(IDS, Heads(1), frozen_direction(dp, IDS, 3, 5), position=3)
    named = len(found.labels) - found.n_extras
    assert torch.allclose(found.scores[:named], gradient.scores[:named], rtol=1e-9, atol=1e-12)
    own = exact_log_probs(dp, 3)
    assert torch.allclose(own, log_probs_of(dp, IDS)[3], atol=1e-6)  # whose norms are in float32
    assert found.target_logits.item() == pytest.approx(float(own[5] - (own.exp() * own).sum()), abs=1e-9)
    assert float(found.scores.sum()) == pytest.approx(found.target_logits.item(), abs=1e-9)
    assert found.completeness_error < 1e-12


def test_the_direction_by_hand():
    """w_t - Σ_j p_j w_j, in float64."""
    dp = DePass(build_model("llama").double())
    rows, hidden = dp.model.lm_head.weight.detach(), dp.trace(IDS).normed_final[-1]
    p = (rows @ hidden).softmax(0)
    direction = rows[5] - p @ rows
    found = dp.attribute(IDS, Tokens(), LogProb(5))
    assert torch.allclose(found.scores, dp.attribute(IDS, Tokens(), direction).scores, rtol=1e-10)
    logits = rows @ hidden
    assert found.target_logits.item() == pytest.approx(float(logits[5] - p @ logits), abs=1e-10)


def test_a_cap_is_frozen_at_its_ratio():
    changes = {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0}
    dp = DePass(build_model("gemma2", **changes).double())
    rows, hidden = dp.adapter.unembedding.weight.detach(), dp.trace(IDS).normed_final[-1]
    raw = rows @ hidden
    ratio = torch.where(raw == 0, 1.0, 2 * torch.tanh(raw / 2) / raw)
    assert ratio.min() < 0.6  # the cap is felt
    own = exact_log_probs(dp, -1)
    direction = ratio[5] * rows[5] - (own.exp() * ratio) @ rows
    found = dp.attribute(IDS, Tokens(), LogProb(5))
    assert torch.allclose(found.scores, dp.attribute(IDS, Tokens(), direction).scores, rtol=1e-8)
    assert found.target_logits.item() == pytest.approx(float(own[5] - (own.exp() * own).sum()), abs=1e-9)
    assert found.completeness_error < 1e-12


def test_what_raises_all_logits_alike_has_no_share():
    model = build_model("llama").double()
    with torch.no_grad():
        model.lm_head.weight[:, 0] = 3.0
    dp = DePass(model)
    with torch.no_grad():
        (found,) = read_directions(traced_request(dp, IDS, LogProb(5)))
    assert abs(float(found.vectors[0, 0])) < 1e-12 < float(found.vectors.abs().max())


def test_where_the_model_is_certain_no_digits_are_lost():
    """1 - p is 1e-9, and so is the direction of the most probable token, relative to its row of the unembedding."""
    dp = DePass(build_model("llama"))
    with torch.no_grad():
        hidden = dp.trace(IDS).normed_final[-1:]
        dp.model.lm_head.weight *= 25 / dp.adapter.logits(hidden).topk(2).values.diff().abs()
        top, means = dp.adapter.logits(hidden).argmax(-1), []
        for dtype in (torch.float32, torch.float64):
            mean = MeanToken.at(dp.adapter, hidden.to(dtype), top)
            means.append(mean.subtracted(top, mean.vectors, mean.constants[:, 0], torch.tensor([0]))[0].double())
    single, exact = means
    assert exact.norm() < 1e-9 * dp.model.lm_head.weight[top].norm()
    assert (single - exact).norm() < 1e-4 * exact.norm()
    found = dp.attribute(IDS, Tokens(), LogProb())
    assert abs(float(found.scores.sum() - found.target_logits)) < 1e-4 * float(found.scores.abs().sum())


@pytest.mark.parametrize("summed", [1, 7, 64])
@pytest.mark.parametrize("block", [1, 32 * 20, 1 << 25])
def test_the_vocabulary_may_be_cut_anywhere(summed, block, monkeypatch):
    dp = build("llama-gqa", torch.float64)
    expected = dp.attribute(BATCH, Tokens(), LogProb(5))
    monkeypatch.setattr("depass_fast.readout.log_probs._ELEMENTS", block)
    monkeypatch.setattr("depass_fast.readout.log_probs._SUMMED", summed)
    for one, other in zip(dp.attribute(BATCH, Tokens(), LogProb(5)), expected, strict=True):
        assert torch.allclose(one.scores, other.scores, rtol=1e-11)


def test_a_long_sum_loses_no_digits():
    """A vocabulary of 50,000 with about the same probability each, and a direction that all have in common."""
    dp = DePass(build_model("llama", vocab_size=50_000, num_hidden_layers=1))
    hidden = dp.trace(IDS).normed_final[-2:] * 1e-3
    with torch.no_grad():
        dp.model.lm_head.weight += 1.0
        top = dp.adapter.logits(hidden).argmax(-1)
        single, exact = (MeanToken.at(dp.adapter, hidden.to(dtype), top) for dtype in (torch.float32, torch.float64))
    assert (single.offsets - exact.offsets).norm() < 1e-6 * exact.offsets.norm()
    assert torch.allclose(single.log_z.double(), exact.log_z, rtol=1e-6)


@pytest.mark.parametrize("kind", kinds(6))
def test_every_kind_of_components_can_be_read(kind):
    dp, components = build("qwen2"), kinds(6)[kind]
    result = dp.attribute(IDS, components, [LogProb(5), LogProb(), 5, None, Contrast(5, 9)])
    by_hand = dp.attribute(IDS, components, frozen_direction(dp, IDS, 5, 5))
    parts = zip(result, by_hand, strict=True) if isinstance(result, LayeredAttribution) else [(result, by_hand)]
    for one, other in parts:
        assert torch.allclose(one.scores[0], other.scores, atol=1e-4) and one.completeness_error < 1e-5
    assert result.target_kinds == ["log-prob", "log-prob", "logit", "logit", "contrast"]


def test_the_models_own_next_token():
    dp = build("llama-gqa")
    own = dp.attribute(IDS, Tokens())
    (token,) = own.target_ids
    for target in (LogProb(), LogProb(None), LogProb(token)):
        found = dp.attribute(IDS, Tokens(), target)
        assert found.target_ids == [token] and found.target_names == [f"log P(id {token}), P frozen"]
        assert torch.equal(found.scores, dp.attribute(IDS, Tokens(), LogProb(token)).scores)
    assert not torch.allclose(found.scores, own.scores, atol=1e-2)


def test_a_contrast_is_the_pair_and_the_difference_of_two_log_probabilities():
    dp = build("llama-biases")
    named, pair, beside = (
        dp.attribute(IDS, Tokens(), target, contrast=contrast)
        for target, contrast in ((Contrast(5, 9), None), ((5, 9), None), (5, 9))
    )
    for other in (pair, beside):
        assert torch.equal(named.scores, other.scores) and named.contrast_ids == other.contrast_ids == [9]
        assert named.target_names == other.target_names and named.target_kinds == other.target_kinds == ["contrast"]
    both = dp.attribute(IDS, Tokens(), [LogProb(5), LogProb(9)])
    assert torch.allclose(both.scores[0] - both.scores[1], named.scores, atol=1e-4)
    assert not dp.attribute(IDS, Tokens(), (5, 5)).scores.any()  # as where two texts have a token in common


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (Tokens(), "exact"),
        (Heads(layers="all"), "exact"),
        (Neurons(layers="all"), "exact"),
        (Neurons(layers="all"), Adjoint(refine=500, sample=0)),
    ],
)
def test_prompts_of_different_lengths_with_targets_of_different_kinds(kind, method, passes):
    dp, vector = build("qwen2"), torch.randn(32, generator=torch.Generator().manual_seed(0))
    targets = [[LogProb(5), 5, LogProb()], [vector, Contrast(3, 4), None], [LogProb(7), LogProb(7), vector]]
    results = dp.attribute(BATCH, kind, targets=targets, position=[-2, -1], method=method)
    assert passes == [4]  # one pass for both positions of two prompts
    for ids, target, (before, last) in zip(BATCH, targets, results, strict=True):
        singles = (
            dp.attribute(ids, kind, target, position=-2, method=method),
            dp.attribute(ids, kind, target, method=method),
        )
        for one, alone in zip((before, last), singles, strict=True):
            assert one.target_names == alone.target_names and one.target_kinds == alone.target_kinds
            layers = zip(one, alone, strict=True) if isinstance(one, LayeredAttribution) else [(one, alone)]
            assert all(torch.allclose(a.scores, b.scores, atol=2e-4) for a, b in layers)
    assert len(passes) == 5  # each of four single calls that ask for it
    traced = dp.attribute(dp.trace(BATCH), kind, targets=targets, method=method)
    for (_, last), other in zip(results, traced, strict=True):
        layers = zip(last, other, strict=True) if isinstance(last, LayeredAttribution) else [(last, other)]
        assert all(torch.allclose(a.scores, b.scores, atol=2e-4) for a, b in layers)


@pytest.mark.parametrize("options", [{"backend": "reference"}, {"stream": True}, {"verify": True}])
def test_options(options):
    dp = build("llama-biases")
    one, other = (dp.attribute(IDS, Tokens(), LogProb(5), **more) for more in (options, {}))
    assert same(one, other)


@pytest.mark.parametrize("kind", [Tokens(), Neurons(layers="all")])
def test_a_continuation_has_the_same_log_probabilities(kind):
    dp = build("qwen2")
    given = dp.attribute(IDS[:4], kind, continuation=IDS[4:], method="exact")
    alone = dp.attribute(IDS[:4], kind, LogProb(IDS[4]), method="exact")
    assert torch.allclose(given.log_prob_steps[0].scores, alone.scores, atol=1e-4)
    step = given.log_prob_steps[0]
    assert (step.target_names, step.target_kinds, step.target_ids) == (
        alone.target_names,
        alone.target_kinds,
        alone.target_ids,
    )
    assert given.steps[0].target_kinds == ["logit"] and given.sum.target_kinds == ["log-prob"]


class Operations(TorchDispatchMode):
    """Counts operations but views, which are none of a device's."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[function.overloadpacket.__name__] += not function.is_view
        return function(*args, **(kwargs or {}))


def test_neither_operations_nor_waits_depend_on_how_many_there_are():
    """Without the model's own operations, of which there is one pass, too."""

    def counted(prompts, targets):
        request = traced_request(build("llama-gqa"), prompts, targets)
        with Operations() as operations, torch.no_grad():
            read_directions(request)
        return +operations.found

    few = counted([IDS, IDS[:3]], [LogProb(5), 3])
    assert few == counted(BATCH * 5, [LogProb(5), LogProb(6), 3, 4, 9])
    assert few["_local_scalar_dense"] == 0  # the host's copies are whole ones


def test_a_hook_that_changes_the_logits_of_others_is_refused(model):
    dp = DePass(model)
    model.lm_head.register_forward_hook(lambda module, args, output: output.index_fill(-1, torch.arange(20, 64), -9))
    assert dp.attribute(IDS, Tokens(), 5).completeness_error < 1e-5
    for kind, method in ((Tokens(), "exact"), (Neurons(1), "adjoint")):
        with pytest.raises(ValueError, match="target: the logsumexp of the model's logits .* forward hook on lm_head"):
            dp.attribute([IDS, IDS[1:]], kind, [3, LogProb(5)], method=method)


def test_a_hook_that_changes_nothing(model):
    """The model is then shown whole prompts, one after the other."""
    dp, targets = DePass(model), [[LogProb(5), 3], [7], [9, LogProb()]]
    plain = dp.attribute(BATCH, Tokens(), targets=targets, position=[-1, 0])
    model.lm_head.register_forward_hook(lambda module, args, output: output)
    for one, other in zip(dp.attribute(BATCH, Tokens(), targets=targets, position=[-1, 0]), plain, strict=True):
        assert all(same(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, dtype):
    dp = DePass(model.to(dtype))
    own = log_probs_of(dp, IDS)[-1]
    entropy = float(-(own.exp() * own).sum())
    for result in dp.attribute([IDS, IDS], Heads(1), [LogProb(5), LogProb()]):
        for token, value in zip(result.target_ids, result.target_logits.tolist(), strict=True):
            assert value == pytest.approx(float(own[token]) + entropy, abs=0.05)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_of_the_unembedding_that_is_not_finite(model, value):
    with torch.no_grad():
        model.lm_head.weight[40, 3] = value
    dp = DePass(model)
    assert dp.attribute(IDS, Tokens(), 5).completeness_error < 1e-5
    with pytest.raises(ValueError, match="target: a row of the unembedding holds NaN or inf"):
        dp.attribute(IDS, Tokens(), LogProb(5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": LogProb(64)}, ValueError, r"target: id 64 is outside the vocabulary \(0 to 63\)"),
        ({"target": LogProb(1.5)}, TypeError, "target: LogProb takes a token id or a string of one token, got 1.5"),
        ({"target": LogProb(torch.ones(32))}, TypeError, r"target: LogProb takes .*, got <float32 tensor \(32,\)"),
        ({"target": LogProb(True)}, TypeError, "target: LogProb takes .* got True"),
        ({"target": LogProb((5, 9))}, TypeError, r"target: LogProb takes .* got \(5, 9\)"),
        ({"target": LogProb(" Paris")}, ValueError, "target ' Paris': a tokenizer is needed"),
        ({"target": [3, LogProb(-1)]}, ValueError, "target: id -1"),
        ({"target": LogProb}, TypeError, r"target: expected None, a token id, a string, LogProb\(token\)"),
        ({"target": LogProb(5), "contrast": 9}, ValueError, r"contrast: .* is that of the logits: .* Contrast\(a, b\)"),
        ({"target": LogProb(5), "end": 2}, ValueError, r"target: .* \(end=...\) only vectors .* log-probabilities"),
        ({"target": Contrast(5, 9), "end": 2}, ValueError, r"target: at the input of a layer \(end=...\) only vectors"),
        ({"target": Contrast(5, 5)}, ValueError, r"target: Contrast\(5, 5\) is of a token and itself"),
        ({"target": Contrast(5, 64)}, ValueError, "target: id 64 is outside"),
        ({"target": Contrast(5, None)}, TypeError, "target: Contrast takes a token id or a string of one token"),
        ({"target": Contrast(LogProb(5), 9)}, TypeError, r"target: Contrast takes .* got LogProb\(5\)"),
        ({"target": Contrast(5, 9), "contrast": 3}, ValueError, "contrast: .* a pair or a vector"),
        ({"target": (LogProb(5), 9)}, TypeError, r"target: expected None, .* got LogProb\(5\)"),
        ({"targets": [LogProb(5), LogProb(6)]}, ValueError, r"targets: expected one per prompt \(1\)"),
        ({"continuation": [5], "target": LogProb()}, ValueError, "target: a continuation is read in front of"),
    ],
)
def test_errors_come_before_any_work(arguments, error, message, monkeypatch):
    monkeypatch.setattr("depass_fast.request.capture", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(error, match=message):
        build("llama-gqa").attribute(IDS, Tokens(), **arguments)


def test_a_text_of_several_tokens(demo):
    with pytest.raises(
        ValueError,
        match=r"target: ' Italian Italian' is 2 tokens: .* given to attribute\(\.\.\., continuation=\.\.\.\)",
    ):
        demo.attribute("Nyria Morstam speaks", Tokens(), LogProb(" Italian Italian"))
    found = demo.attribute("Nyria Morstam speaks", Tokens(), [LogProb(" Italian"), Contrast(" Italian", " French")])
    assert found.target_names == ["log P(' Italian'), P frozen", "' Italian' - ' French'"]
    assert "log P(' Italian'), P frozen at position 4 (after ' speaks'): log P + entropy 0." in str(found)
    assert found.columns()[0] == ["label", *found.target_names]


def test_targets_are_short_to_read():
    assert [repr(one) for one in (LogProb(), LogProb(5), LogProb(" Paris"), Contrast(" Paris", 9))] == [
        "LogProb()",
        "LogProb(5)",
        "LogProb(' Paris')",
        "Contrast(' Paris', 9)",
    ]
    assert len(repr(LogProb(torch.zeros(4096)))) < 80  # pyright: ignore[reportArgumentType]
    assert LogProb(5) == LogProb(5) != LogProb() and len({Contrast(1, 2), Contrast(1, 2)}) == 1


@pytest.mark.parametrize("kind", [Tokens(), Heads(layers="all")])
def test_results_know_the_kind_of_their_targets(kind, tmp_path):
    dp, path = build("qwen2"), tmp_path / "r.safetensors"
    several, single = dp.attribute(IDS, kind, [LogProb(5), 3]), dp.attribute(IDS, kind, LogProb(5))
    assert (several.to_dict()["target_kind"], single.to_dict()["target_kind"]) == (["log-prob", "logit"], "log-prob")
    several.save(path)
    loaded = Attribution.load(path)
    assert loaded.target_kinds == ["log-prob", "logit"] and str(loaded) == str(several)
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    content = json.loads(metadata["json"])
    for part in content.get("layers", [content]):
        del part["target_kinds"]  # as older versions wrote it
    save_file(tensors, str(path), metadata=metadata | {"json": json.dumps(content)})
    older = Attribution.load(path)
    assert older.target_kinds is None and older.to_dict()["target_kind"] is None and "logit" in str(older)
