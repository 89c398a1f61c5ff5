"""Components of several layers in one call: one sweep gives what each layer gives by itself."""

import pytest
import torch

from depass_fast import Attribution, DePass, Heads, LayeredAttribution, Modules, Neurons
from depass_fast.methods.layers import _pending
from depass_fast.propagation.joint import PendingState, group_by_memory, propagate_jointly
from tests.support.family_models import build_model
from tests.support.models import FAMILIES, build, random_ids
from tests.support.steps import request_of, start_state

_EXPERTS = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 8}


def same(together, alone):
    assert together.labels == alone.labels and together.layer == alone.layer
    assert together.target_ids == alone.target_ids and together.completeness_error <= 1e-5
    assert torch.allclose(together.scores, alone.scores, rtol=0, atol=1e-5 * float(alone.scores.abs().max()))
    assert torch.equal(together.target_logits, alone.target_logits)


PLAIN = [(name, backend) for name in FAMILIES for backend in ("reference", "torch")]


@pytest.mark.parametrize(("name", "backend"), [*PLAIN, ("llama-biases", "triton"), ("mistral-window", "triton")])
def test_all_layers_equal_each_by_itself(name, backend):
    dp, ids = build(name), random_ids(3 if backend == "triton" else 8, seed=1)  # interpreted
    trace = dp.trace(ids)
    for kind in (Heads, Neurons, Modules):
        found = dp.attribute(trace, kind(layers="all"), [None, (3, 4)], method="exact", backend=backend)
        assert isinstance(found, LayeredAttribution) and found.layers == [0, 1, 2]
        for layer, result in enumerate(found):
            same(result, dp.attribute(trace, kind(layer), [None, (3, 4)], backend=backend))


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "gemma2", "qwen2_moe", "opt", "mpt"])
def test_all_layers_of_other_families(model_type):
    dp, ids = DePass(build_model(model_type, **(_EXPERTS if model_type == "qwen2_moe" else {}))), random_ids(6, seed=2)
    trace = dp.trace([ids, ids[:3]])
    for kind in (Heads, Neurons):
        for p, found in enumerate(dp.attribute(trace, kind(layers="all"), method="exact")):
            for layer, result in enumerate(found):
                same(result, dp.attribute(trace, kind(layer))[p])


def test_some_layers_rules_and_an_end():
    dp, ids = build("qwen2"), random_ids(7, seed=3)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    for rule in ("softmax", "linear", "max"):
        found = dp.attribute(ids, Heads(layers=[1, 0]), direction, end=2, allocation=rule, position=4)
        assert found.layers == [0, 1]
        for result in found:
            same(result, dp.attribute(ids, Heads(result.layer), direction, end=2, allocation=rule, position=4))
    last = dp.attribute(ids, Neurons(layers=[-1]), direction, end=3)
    same(last[2], dp.attribute(ids, Neurons(-1), direction, end=3))


def test_bias_is_there_only_where_constants_are_to_come():
    found = build("qwen2").attribute(random_ids(5), Neurons(layers="all"), method="exact")
    assert [result.labels[-1] for result in found] == ["bias", "bias", "rest"]


def test_experts_of_different_layers_are_no_table(tmp_path):
    dp = DePass(build_model("qwen2_moe", **_EXPERTS, mlp_only_layers=[1]))
    found = dp.attribute(random_ids(2), Neurons(layers="all"), method="exact")
    with pytest.raises(ValueError, match="scores: no table, the layers have different numbers of components"):
        _ = found.scores
    (label, score), *_ = found.top(3)
    assert found.score(label) == pytest.approx(score) and len(found.labels) == len(set(found.labels))
    found.save(tmp_path / "experts.safetensors")
    assert Attribution.load(tmp_path / "experts.safetensors").top(3) == found.top(3)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral"])
def test_what_a_start_will_hold_is_told_by_the_trace(model_type, monkeypatch):
    """Experts' neurons are counted, not made: one look at each layer, and each prompt's once, for its state."""
    dp, made, bound = DePass(build_model(model_type, **_EXPERTS, num_local_experts=4)), [], Neurons.bound
    trace = dp.trace([random_ids(n, seed=n) for n in (6, 1, 2)])
    monkeypatch.setattr(Neurons, "bound", lambda *given: made.append(given) or bound(*given))
    dp.attribute(trace, Neurons(layers="all"), method="exact")
    assert len(made) == 3 * 3
    with torch.no_grad():
        for layer in range(3):
            request = request_of(dp, trace, Neurons(layer))
            counts = Neurons(layer).counts(dp.adapter, trace)
            state, start = start_state(dp, trace, Neurons(layer)), _pending(request, counts)
            assert (start.layer, start.nbytes, start.device) == (state.layer, state.nbytes, state.device)
            assert counts == [len(c.names) for c in state.layout.components] and len(set(counts)) > 1


@torch.no_grad()
def test_states_that_are_too_large_together_are_carried_in_groups(monkeypatch):
    dp, ids = build("llama-gqa"), random_ids(7, seed=4)
    trace = dp.trace(ids)
    states = [start_state(dp, trace, Heads(layer)) for layer in range(3)]
    monkeypatch.setattr("depass_fast.propagation.joint.JOINT_BYTES", states[0].nbytes * 2)
    assert [len(group) for group in group_by_memory(map(PendingState.of, states))] == [2, 1]
    found = dp.attribute(trace, Heads(layers="all"))
    assert len(found) == 3
    for result in found:
        same(result, dp.attribute(trace, Heads(result.layer)))


@pytest.mark.parametrize(("places", "sizes"), [("cpu", [3, 3, 1]), (("cpu", "meta"), [4, 3])])
def test_a_group_ends_where_its_device_has_no_room_for_two_copies_more(places, sizes, monkeypatch):
    """States held on a device have taken its free memory; states held elsewhere still have to be carried here."""
    places = [torch.device(place) for place in ([places] if isinstance(places, str) else places)]
    monkeypatch.setattr("depass_fast.propagation.joint.available", lambda device: 34_000)
    starts = [PendingState(i, 1000, places[i % len(places)], lambda: None) for i in range(7)]
    groups = list(group_by_memory(starts))
    assert [len(group) for group in groups] == sizes
    assert [start for group in groups for start in group] == starts


@torch.no_grad()
def test_a_sweep_may_end_anywhere_and_keep_all_positions():
    dp, ids = build("llama-biases"), random_ids(7, seed=5)
    trace, run = dp.trace([ids, ids[:4]]), dp.options.build(dp.adapter)
    for end in (1, 2, 3):
        states = [start_state(dp, trace, Neurons(layer)) for layer in range(end)]
        starts = list(map(PendingState.of, states))
        found = list(propagate_jointly(dp.adapter, trace, starts, end, run))
        assert len(found) == end
        for layer, (state, errors) in enumerate(found):
            alone = dp.decompose(trace, Neurons(layer), end=end)
            assert len(errors) == end - layer
            for prompt in range(2):
                whole = alone.dense(prompt)
                assert torch.allclose(state.dense(prompt), whole, atol=1e-5 * float(whole.abs().max()))


def test_what_is_no_list_of_layers():
    dp, ids = build("llama-gqa"), random_ids(4)
    for layers, error in (
        ("most", "neither 'all'"),
        ([], "empty"),
        ([0, 3], "out of range"),
        (1, "expected 'all' or a"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"layers?: .*{error}"):
            dp.attribute(ids, Heads(layers=layers))
    for call in (dp.decompose, lambda *a: dp.start(dp.trace(ids), a[1])):
        with pytest.raises(ValueError, match=r"layers: only attribute\(\) and plan\(\) take several layers"):
            call(ids, Heads(layers="all"))


def test_streamed_batches_go_layer_by_layer():
    dp, prompts = build("llama-gqa"), [random_ids(7, seed=1), random_ids(4, seed=2)]
    for kind in (Heads(layers="all"), Modules(layers=[0, 2], which="attention")):
        oracle = dp.attribute(prompts, kind, 3, backend="reference")
        for found, expected in zip(dp.attribute(prompts, kind, 3, stream=True), oracle, strict=True):
            for result, other in zip(found, expected, strict=True):
                same(result, other)


def test_hooks_in_a_list_say_what_they_say_alone():
    dp, ids = build("llama-gqa"), random_ids(5)
    found = dp.attribute(ids, Modules(layers=["blocks.1.hook_mlp_out", "blocks.0.hook_mlp_out"]))
    assert [result.labels for result in found] == [["L0.mlp", "rest"], ["L1.mlp", "rest"]]
    with pytest.raises(ValueError, match="layers: .* name different outputs"):
        dp.attribute(ids, Modules(layers=["blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"]))


def test_the_plan_of_all_layers_is_that_of_each_together():
    dp = build("llama-gqa")
    whole, each = dp.plan(9, Heads(layers="all")), [dp.plan(9, Heads(layer)) for layer in range(3)]
    assert whole.flop == sum(one.flop for one in each) and whole.rows == sum(one.rows for one in each)
    assert whole.upper_bound and whole.of().peak_bytes >= max(one.of().peak_bytes for one in each)
    with pytest.raises(ValueError, match="end: 9 is out of range; these components reach layers 2 to 3"):
        dp.plan(9, Heads(1), end=9)
