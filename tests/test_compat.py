"""The published interface: every number of the published implementation, its scripts, and what it meant to do."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build, build_model, random_ids
from test_parity import agree, select
from test_published import cases, load

from depass_fast import Tokens
from depass_fast.compat import decomposed_state_manager
from depass_fast.compat.rules import RULES
from depass_fast.demo import demo_path, load_demo

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


def test_the_forward_pass_is_taken_again_when_it_must():
    subject = decomposed_state_manager(build_model("llama"), None)
    ids = random_ids(5)
    subject.get_states(ids)
    trace = subject._trace
    subject.get_mlp_neuron_decomposed_state(ids, 0)
    assert subject._trace is trace
    with torch.no_grad():
        subject.model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    changed = subject.get_states(ids)
    assert subject._trace is not trace and not torch.equal(changed[-1][0], trace.resid_final)
    assert len(subject.get_states(ids[:3])) == len(changed) and subject.attribute_len == 3


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
    assert result.prompt_length == start and len(result.steps) == len(result.input_ids) - start <= 4
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


def test_generate_cite_returns_what_was_published():
    model, tokenizer = load_demo()
    subject = decomposed_state_manager(model, tokenizer)
    prompt = "Nyria Morstam speaks"
    text, scores, state, states = subject.model_generate_cite(prompt, max_length=12, do_sample=False)
    start = len(tokenizer.encode(prompt))
    n = start + len(scores)
    assert text.startswith(prompt) and state.shape[:2] == (n, n) and states[0].shape[1] == n <= 12
    ids = subject._trace.input_ids.tolist()
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


# -- scripts --------------------------------------------------------------------------------------------------------

SCRIPT = """
import argparse, json, os, sys
sys.path.append(os.path.join(os.path.dirname(__file__), ".."))
from DePass import decomposed_state_manager
import DePass.manager
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_path")
    parser.add_argument("--dataset")
    parser.add_argument("--output")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model_path, torch_dtype=torch.float32).to(torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    manager = decomposed_state_manager(model, tokenizer, mlp_decomposed_function="softmax")
    results = []
    with open(args.dataset) as f:
        data_all = json.load(f)
    for data in data_all:
        target = tokenizer.encode(data["target_token"], add_special_tokens=False)[0]
        state, states = manager.get_last_layer_decomposed_state(data["prompt"])
        scores = manager.compute_attribute_score(state, -1, target).unsqueeze(0).cpu().detach().numpy().tolist()
        neurons = manager.get_mlp_neuron_decomposed_state(data["prompt"], 1)
        assert manager.model is model and manager.tokenizer is tokenizer and len(manager.states) == len(states)
        results.append({"DePass": scores, "neurons": np.asarray(neurons[-1].sum(-1).numpy()).tolist()})
    with open(args.output, "w") as f:
        json.dump(results, f)

if __name__ == "__main__":
    main()
"""


def test_a_published_script_runs_unchanged(tmp_path):
    script, data, out = tmp_path / "script.py", tmp_path / "data.json", tmp_path / "out.json"
    script.write_text(SCRIPT)
    prompts = ["Nyria Morstam speaks", "Nyria Morstam"]
    data.write_text(json.dumps([{"prompt": p, "target_token": " the"} for p in prompts]))
    command = [sys.executable, "-m", "depass_fast.compat", str(script), "--model_path", str(demo_path())]
    command += ["--dataset", str(data), "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    subject = decomposed_state_manager(*load_demo())
    target = subject.tokenizer.encode(" the", add_special_tokens=False)[0]
    for prompt, result in zip(prompts, json.loads(out.read_text()), strict=True):
        state, _ = subject.get_last_layer_decomposed_state(prompt)
        expected = subject.compute_attribute_score(state, -1, target)
        assert torch.allclose(torch.tensor(result["DePass"][0]), expected, atol=1e-5)
        assert len(result["neurons"]) == 1 + subject.model.config.intermediate_size


def test_a_missing_script_is_named(tmp_path):
    command = [sys.executable, "-m", "depass_fast.compat", str(tmp_path / "none.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 1 and "there is no script" in done.stderr and "Traceback" not in done.stderr
