"""The published interface: every number of the published implementation, its scripts, and what it meant to do."""

from __future__ import annotations

import inspect

import pytest
import torch

from depass_fast import Attribution, Tokens
from depass_fast.compat import decomposed_state_manager
from depass_fast.compat.rules import RULES
from depass_fast.demo import load_demo
from tests.support.family_models import build_model, build_variant
from tests.support.models import build, random_ids
from tests.support.published import agree, cases, load, select

CALLS = {case.values[1]["call"] for case in cases()} - {"model", "compute_attribute_score"}


def manager(name: str, case: dict, **changes) -> decomposed_state_manager:
    return decomposed_state_manager(load(name)[0], None, **{**case.get("manager", {}), **changes})


def call(state_manager: decomposed_state_manager, case: dict, golden: dict, **changes):
    """The call of a case; the state alone, as one tensor."""
    args = {**case.get("args", {}), **changes}
    if "attribute_state" in args:
        args["attribute_state"] = golden[args["attribute_state"]]
    result = getattr(state_manager, case["call"])(case["input_ids"], **args)
    result = result[0] if isinstance(result, tuple) else result
    return torch.stack(result) if isinstance(result, list) else result


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("name", "case"), select(*CALLS))
def test_every_published_number(name, case, backend):
    golden = load(name)[1]
    agree(call(manager(name, case, backend=backend), case, golden), case, golden)


@pytest.mark.parametrize(("name", "case"), select("compute_attribute_score"))
def test_published_scores(name, case):
    subject, args = manager(name, case), case["args"]
    state, _ = getattr(subject, args["of"])(case["input_ids"])
    score = subject.compute_attribute_score(state, args["token_idx"], args["decode_token_id"])
    agree(score, case, load(name)[1])
    assert score.dtype == torch.float32
    ids = [args["decode_token_id"], 3]
    assert torch.allclose(subject.compute_attribute_score(state, args["token_idx"], ids)[:, 0], score, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_mha", "qwen2_gqa"])
def test_grouping_changes_nothing(name):
    subject = manager(name, {})
    ids = random_ids(7)
    whole = subject.get_mlp_neuron_decomposed_state(ids, 1)
    assert torch.equal(subject.get_mlp_neuron_decomposed_state(ids, 1, compute_num=4), whole)
    for method in (subject.get_last_layer_decomposed_state, subject.all_layer_to_init_attribute_state):
        assert torch.equal(method(ids, single_compute_token=3)[0], method(ids)[0])


def test_states_are_the_residual_stream():
    model, subject, ids = load("llama_gqa")[0], manager("llama_gqa", {}), random_ids(6)
    states = subject.get_states(ids)
    hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert len(states) == 2 * subject.num_layers + 1 and subject.states is states and subject.attribute_len == 6
    for layer in range(subject.num_layers):
        assert torch.allclose(states[2 * layer], hidden[layer], rtol=1e-4, atol=1e-4)
    assert torch.allclose(model.model.norm(states[-1]), hidden[-1], rtol=1e-4, atol=1e-4)
    state, again = subject.get_last_layer_decomposed_state(ids)
    assert again is subject.states and torch.allclose(subject.compute_decomposed_state(0), state)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2"])
def test_negative_layers_count_from_the_end(name, corrected):
    dp, ids = build(name), random_ids(5)
    subject = decomposed_state_manager(dp.model, None, corrected=corrected)
    for layer, other in ((-1, 2), (-3, 0)):
        assert torch.equal(
            subject.get_mlp_neuron_decomposed_state(ids, layer), subject.get_mlp_neuron_decomposed_state(ids, other)
        )
        for kind in ("attn", "mlp", "attn_head"):
            ours = subject.get_layer_module_decomposed_state(ids, layer, type=kind)
            assert torch.equal(ours, subject.get_layer_module_decomposed_state(ids, other, type=kind))
        ours, theirs = (subject.get_middle_to_last_decomposed_state(ids, i)[0] for i in (layer, other))
        assert torch.equal(ours, theirs)


def test_corrected_subspaces_have_a_first_component_even_where_nothing_is_lacking():
    dp, ids = build("llama-gqa"), random_ids(5)
    subject = decomposed_state_manager(dp.model, None, corrected=True)
    x = dp.trace(ids).resid(1)
    state = subject.get_subspace_decomposed_state(ids, 0, torch.stack([x / 4, 3 * x / 4]))
    assert state.shape == (5, 3, 32) and not state[:, 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox: parallel", "opt: stream norms, projected embedding", "bloom"])
def test_the_states_are_the_models_own_with_constants_and_without(name, dtype):
    """Norms with β: what the published code leaves out of the propagation is not left out of the forward pass."""
    model, ids = build_variant(name).to(dtype), random_ids(6)
    own = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    for corrected in (False, True):
        states = decomposed_state_manager(model, None, corrected=corrected).get_states(ids)
        for layer in range(3):
            assert torch.allclose(states[2 * layer][0], own[layer][0], atol=1e-5)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_unembeddings_bias(corrected):
    """Published: in every component. Corrected: in `bias`, so that the shares sum to the logit."""
    model = build_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 64))
    subject, ids = decomposed_state_manager(model, None, corrected=corrected), random_ids(6)
    state, _ = subject.get_last_layer_decomposed_state(ids)
    score, logit = subject.compute_attribute_score(state, -1, 9), model(torch.tensor([ids])).logits[0, -1, 9]
    expected = logit if corrected else logit + (len(score) - 1) * model.lm_head.bias[9]
    assert torch.allclose(score.sum(), expected, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases", "qwen2"])
def test_corrected_states_are_complete(name, rule):
    """Under every rule and for every call the components, `bias` among them, sum to the hidden state."""
    dp, ids = build(name), random_ids(6)
    subject = decomposed_state_manager(dp.model, None, mlp_decomposed_function=rule, corrected=True)
    trace = dp.trace(ids)
    part = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    results = {
        "tokens": subject.get_last_layer_decomposed_state(ids)[0],
        "middle": subject.get_middle_to_last_decomposed_state(ids, 1)[0],
        "neurons": subject.get_mlp_neuron_decomposed_state(ids, 0),
        "subspace": subject.get_subspace_decomposed_state(ids, 0, part),
        "last": subject.get_subspace_decomposed_state(ids, 2, part),
        **{kind: subject.get_layer_module_decomposed_state(ids, 1, type=kind) for kind in ("attn", "mlp", "attn_head")},
    }
    for label, state in results.items():
        assert relative_error(state.sum(1), trace.normed_final) <= 1e-5, label
    layers = subject.all_layer_to_init_attribute_state(ids)[0]
    for layer, state in enumerate(layers):
        assert relative_error(state.sum(1), trace.resid(layer)) <= 1e-5, layer


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


def test_results_are_the_models_dtype_on_the_cpu():
    model = build_model("llama").to(torch.bfloat16)
    state, _ = decomposed_state_manager(model, None).get_last_layer_decomposed_state(random_ids(5))
    assert state.dtype == torch.bfloat16 and state.device.type == "cpu" and state.shape == (5, 5, 32)


def test_bad_input():
    model = build_model("llama")
    with pytest.raises(ValueError, match="mlp_decomposed_function: 'mean' is not one of softmax, linear"):
        decomposed_state_manager(model, None, mlp_decomposed_function="mean")
    with pytest.raises(TypeError, match="temperature: say it by the published arguments"):
        decomposed_state_manager(model, None, temperature=1.0)
    with pytest.raises(ValueError, match="temperature: -1 is out of range"):
        decomposed_state_manager(model, None, mlp_softmax_temp=-1)
    subject = decomposed_state_manager(model, None)
    with pytest.raises(RuntimeError, match="call get_states"):
        subject.compute_decomposed_state(0)
    with pytest.raises(ValueError, match="type must be 'attn' or 'mlp' or 'attn_head'"):
        subject.get_layer_module_decomposed_state(random_ids(4), 0)
    with pytest.raises(ValueError, match="layer: 9 is out of range"):
        subject.get_mlp_neuron_decomposed_state(random_ids(4), 9)
    with pytest.raises(ValueError, match="end: 1 is out of range"):
        subject.get_middel_to_middle_decomposed_state(random_ids(4), 2, 1)
    with pytest.raises(ValueError, match="states: expected shape"):
        subject.get_subspace_decomposed_state(random_ids(4), 0, torch.zeros(2, 3, 32))


# -- generation -----------------------------------------------------------------------------------------------------


def test_generation_decomposes_what_was_generated(demo):
    prompt = "Nyria Morstam speaks"
    result = demo.attribute_generation(prompt, max_new_tokens=4)
    start = len(demo.tokenizer.encode(prompt))
    assert result.prompt_length == start and 0 < len(result.steps) == len(result.input_ids) - start <= 4
    assert result.text.startswith(prompt) and result.completeness_error < 1e-5
    for step in result.steps:  # the same as asking for every token by itself
        ids = result.input_ids[: step.position + 1]
        alone = demo.attribute(ids, Tokens(), result.input_ids[step.position + 1])
        assert step.labels == alone.labels
        assert torch.allclose(step.scores, alone.scores, atol=1e-4)
        assert step.target_ids == [result.input_ids[step.position + 1]]
        greedy = demo.attribute(ids, Tokens())
        assert greedy.target_ids == step.target_ids
    assert result.scores.shape == (len(result.steps), len(result.input_ids))
    assert not result.scores[0, start:].any()
    assert len(result.to_dataframe()) == sum(len(step.labels) for step in result.steps)
    assert "completeness error" in str(result)


def test_generation_without_a_tokenizer_and_with_biases():
    dp, ids = build("qwen2"), random_ids(4)
    result = dp.attribute_generation(ids, max_new_tokens=3, generation={"eos_token_id": None})
    assert result.text is None and len(result.steps) == 3 and result.completeness_error < 1e-5
    assert all(step.labels[-1] == "bias" for step in result.steps)
    assert torch.allclose(
        torch.stack([step.scores.sum() for step in result.steps]),
        torch.stack([step.target_logits for step in result.steps]),
        atol=1e-4,
    )
    with pytest.raises(TypeError, match="unknown option 'colour'"):
        dp.attribute_generation(ids, colour=1)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2"])
def test_a_step_of_a_generation_is_an_attribution_like_any_other(name, tmp_path):
    dp, ids = build(name), random_ids(4)
    arguments = {"eos_token_id": None, "return_dict_in_generate": True}
    result = dp.attribute_generation(ids, max_new_tokens=3, generation=arguments)
    assert len(result.steps) == 3
    for step in result.steps:
        assert len(step.tokens) == len(step.input_ids) == step.position + 1
        alone = dp.attribute(result.input_ids[: step.position + 1], Tokens(), step.target_ids[0])
        assert str(step).splitlines()[1:] != [] and step.labels == alone.labels and step.tokens == alone.tokens
        step.save(tmp_path / "step.safetensors")
        assert torch.equal(Attribution.load(tmp_path / "step.safetensors").scores, step.scores)
        assert len(step.to_dataframe()) == len(step.labels)


def test_generation_refuses_before_any_work(monkeypatch):
    dp = build("llama-gqa")
    monkeypatch.setattr(dp.model, "generate", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(
        ValueError, match="max_new_tokens: 30 after a prompt of 60 tokens pass the model's context of 64"
    ):
        dp.attribute_generation(random_ids(60), max_new_tokens=30)
    with pytest.raises(TypeError, match="prompt: one prompt at a time"):
        dp.attribute_generation([random_ids(4), random_ids(5)])
    with pytest.raises(TypeError, match="prompt: one prompt at a time"):
        dp.attribute_generation(dp.trace(random_ids(4)))
    with pytest.raises(ValueError, match="num_return_sequences must be 1"):
        dp.attribute_generation(random_ids(4), generation={"num_beams": 2, "num_return_sequences": 2})
    with pytest.raises(ValueError, match="a tokenizer is needed"):
        decomposed_state_manager(dp.model, None).model_generate_cite(random_ids(4))


def test_generate_cite_returns_what_was_published():
    model, tokenizer = load_demo()
    subject = decomposed_state_manager(model, tokenizer)
    prompt = "Nyria Morstam speaks"
    text, scores, state, states = subject.model_generate_cite(prompt, max_length=12, do_sample=False)
    start = len(tokenizer.encode(prompt))
    n = start + len(scores)
    assert text.startswith(prompt) and state.shape[:2] == (n, n) and states[0].shape[1] == n <= 12 and n > start
    ids = subject._kept.trace.input_ids.tolist()
    for i, entry in enumerate(scores, start):
        assert set(entry) == {"token", "attribute_score"} and entry["token"] == tokenizer.decode(ids[i])
        logit = model(torch.tensor([ids[:i]])).logits[0, -1, ids[i]]
        assert torch.allclose(entry["attribute_score"].sum(), logit, atol=1e-3)
        assert not entry["attribute_score"][i:].any()
    with pytest.raises(ValueError, match="num_return_sequences must be 1"):
        subject.model_generate_cite(prompt, num_return_sequences=2)


def test_argument_names_are_the_published_ones():
    names = {
        "get_last_layer_decomposed_state": ["prompt", "single_compute_token"],
        "get_middle_to_last_decomposed_state": ["prompt", "start_layer_idx"],
        "get_middel_to_middle_decomposed_state": ["prompt", "start_layer_idx", "end_layer_idx", "single_compute_token"],
        "all_layer_to_init_attribute_state": ["prompt", "single_compute_token"],
        "get_mlp_neuron_decomposed_state": ["prompt", "start_layer_idx", "compute_num"],
        "get_layer_module_decomposed_state": ["prompt", "start_layer_idx", "single_compute_token", "type"],
        "get_subspace_decomposed_state": ["prompt", "start_layer_idx", "attribute_state"],
        "get_subspace_decomposed_state_all_layer": ["prompt", "start_layer_idx", "attribute_state"],
        "compute_attribute_score": ["attribute_state", "token_idx", "decode_token_id"],
    }
    for name, expected in names.items():
        assert list(inspect.signature(getattr(decomposed_state_manager, name)).parameters)[1:] == expected
