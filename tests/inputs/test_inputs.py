"""Bad input is refused before any work, by an error that names the argument and what is allowed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from depass_fast import Custom, DePass, Heads, Modules, Neurons, Subspaces, Tokens
from tests.support.family_models import build_model
from tests.support.models import build, random_ids

IDS = random_ids(6)


@pytest.fixture
def dp():
    return build("llama-gqa")


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test if a forward pass begins."""

    def forbidden(*args, **kwargs):
        raise AssertionError("a forward pass began")

    monkeypatch.setattr("depass_fast.request.capture", forbidden)


def test_unknown_family_names_the_supported_ones():
    config = AutoConfig.for_model("xlnet", d_model=16, n_layer=1, n_head=1, d_inner=8, vocab_size=8)
    with pytest.raises(
        ValueError,
        match="'xlnet' is not supported .attention over permutations .*. Supported families: afmoe, .*llama, ",
    ):
        DePass(AutoModelForCausalLM.from_config(config))


def test_what_is_no_causal_model():
    with pytest.raises(TypeError, match="expected a loaded Hugging Face causal language model, got Linear"):
        DePass(torch.nn.Linear(2, 2))
    config = AutoConfig.for_model("llama", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    with pytest.raises(TypeError, match="AutoModelForCausalLM"):
        DePass(AutoModel.from_config(config))


@pytest.mark.parametrize("kind", [Tokens(3), Heads(3), Neurons(-4), Modules(99)])
def test_layer_out_of_range(dp, no_work, kind):
    with pytest.raises(ValueError, match="layer: .* is out of range; this model has layers 0 to 2"):
        dp.attribute(IDS, kind)


def test_layers_count_from_the_end_too(dp):
    assert dp.attribute(IDS, Heads(-1)).labels[0] == "L2H0"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"position": 6}, ValueError, "position: 6 is out of range for a prompt of 6 tokens"),
        ({"position": -7}, ValueError, "position: -7 is out of range"),
        ({"position": 1.0}, TypeError, "position: expected an integer"),
        ({"target": 64}, ValueError, r"target: id 64 is outside the vocabulary \(0 to 63\)"),
        ({"target": -1}, ValueError, "target: id -1"),
        ({"target": " Paris"}, ValueError, "a tokenizer is needed"),
        ({"target": []}, ValueError, "target: empty list"),
        ({"target": (1, 99)}, ValueError, "target's contrast: id 99 is outside the vocabulary"),
        ({"target": (1, 2, 3)}, ValueError, r"target: a contrast is a pair \(a, b\)"),
        ({"target": torch.zeros(5)}, ValueError, r"target: a direction must have shape \(32,\), got \(5,\)"),
        ({"target": torch.full((32,), float("nan"))}, ValueError, "target: the direction holds NaN or inf"),
        ({"target": {}}, TypeError, "target: expected None, a token id"),
        ({"target": True}, TypeError, "target: expected None, a token id"),
        ({"targets": [1, 2]}, ValueError, r"targets: expected one per prompt \(1\)"),
        ({"allocation": "softmin"}, ValueError, "allocation: unknown rule 'softmin'. Allowed: softmax, linear"),
        ({"temperature": 0.0}, ValueError, "temperature: 0.0 is out of range"),
        ({"temperature": float("nan")}, ValueError, "temperature: nan is out of range"),
        ({"temperature": "hot"}, TypeError, "temperature: expected a positive number"),
        ({"backend": "cuda"}, ValueError, "backend: unknown backend 'cuda'. Available on cpu: 'auto', 'reference'"),
        ({"state_dtype": "int8"}, ValueError, "state_dtype: 'int8' is no floating dtype"),
        ({"compute_dtype": "float99"}, ValueError, "compute_dtype: 'float99' is no floating dtype"),
        ({"backend": "reference", "compute_dtype": "bfloat16"}, ValueError, "compute_dtype: the reference backend"),
        ({"memory_budget": 0}, ValueError, "memory_budget: expected a positive number of bytes"),
        ({"exclude_special": [9]}, ValueError, "exclude_special: position 9 is out of range"),
        ({"end": 4}, ValueError, "end: 4 is out of range"),
        ({"end": 2}, ValueError, r"target: at the input of a layer \(end=...\) only vectors"),
        ({"flavour": 1}, TypeError, "unknown option 'flavour'; options: allocation"),
    ],
)
def test_arguments_of_attribute(dp, no_work, arguments, error, message):
    with pytest.raises(error, match=message):
        dp.attribute(IDS, Tokens(), **arguments)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "prompt: empty"),
        (torch.zeros(0, dtype=torch.long), ValueError, "prompt: empty"),
        ([1, 64], ValueError, r"prompt: id 64 is outside the vocabulary \(0 to 63\)"),
        ([1, -1], ValueError, "prompt: id -1"),
        ([1] * 65, ValueError, "prompt: 65 tokens, but the model's context is 64"),
        (torch.zeros(2), TypeError, "prompt: expected integer ids, got dtype torch.float32"),
        (torch.zeros(1, 1, 2, dtype=torch.long), ValueError, "prompt: expected ids of shape"),
        ([1, 2.5], TypeError, "prompt: expected text, token ids or chat messages"),
        (5, TypeError, "prompt: expected text, token ids or chat messages, got int"),
        (b"Hello", TypeError, r"prompt: expected text, got bytes; decode them first: prompt.decode\('utf-8'\)"),
        ([b"Hello"], TypeError, "prompt: expected text, got bytes"),
        (np.array([b"Hello"]), TypeError, "prompt: expected text, got bytes"),
        (bytearray(b"Hello"), TypeError, "prompt: expected text, got bytes"),
        (np.array(["Hello", "you"]), ValueError, "prompt as text: a tokenizer is needed"),
        ("Hello", ValueError, "prompt as text: a tokenizer is needed"),
        ([{"role": "user", "content": "Hi"}], ValueError, "prompt as chat messages: a tokenizer is needed"),
        ([[1, 2], []], ValueError, "prompt: empty"),
    ],
)
def test_prompts(dp, no_work, prompt, error, message):
    with pytest.raises(error, match=message):
        dp.attribute(prompt, Tokens())


def test_what_is_no_kind_of_component(dp, no_work):
    for wrong in ("tokens", Tokens, None):
        with pytest.raises(TypeError, match="components: expected Tokens"):
            dp.attribute(IDS, wrong)
    with pytest.raises(TypeError, match="layer: expected an integer"):
        dp.attribute(IDS, Tokens(3.0))
    with pytest.raises(ValueError, match="which: 'ffn' is not one of"):
        dp.attribute(IDS, Modules(0, which="ffn"))


@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        (None, TypeError, "states: expected a floating-point tensor of shape"),
        (torch.zeros(6, 2, 32, dtype=torch.long), TypeError, "got dtype torch.int64"),
        (torch.zeros(6, 32), ValueError, r"states: expected shape \(6, M, 32\) with M ≥ 1, got \(6, 32\)"),
        (torch.zeros(5, 2, 32), ValueError, r"got \(5, 2, 32\)"),
        (torch.zeros(6, 2, 31), ValueError, r"got \(6, 2, 31\)"),
        (torch.zeros(6, 0, 32), ValueError, r"got \(6, 0, 32\)"),
        (torch.full((6, 1, 32), float("inf")), ValueError, "states: holds NaN or inf"),
    ],
)
def test_custom_states(dp, no_work, states, error, message):
    with pytest.raises(error, match=message):
        dp.attribute(IDS, Custom(1, states))


def test_custom_labels_site_and_batch(dp, no_work):
    states = torch.zeros(6, 2, 32)
    with pytest.raises(ValueError, match="labels: expected 2, one per component, got 1"):
        dp.attribute(IDS, Custom(1, states, ["a"]))
    with pytest.raises(ValueError, match="site: 'middle' is not one of"):
        dp.attribute(IDS, Custom(1, states, site="middle"))
    with pytest.raises(ValueError, match="its states belong to one prompt, got 2 prompts"):
        dp.attribute([IDS, IDS], Custom(1, states))


def test_subspaces(dp, no_work):
    eye = torch.eye(32)
    for bases, message in [
        ([], "bases: empty"),
        ([eye[:, :4], eye[:, 3:6]], r"bases\[0\] and bases\[1\] overlap \(largest cosine 1\)"),
        ([torch.zeros(32, 2)], r"bases\[0\]: column 0 is zero, which is no direction"),
        ([torch.ones(32, 2)], r"bases\[0\]: its columns are linearly dependent"),
        ([torch.zeros(31, 2)], r"bases\[0\]: expected shape \(32, k\)"),
        ([eye[0, :5]], r"bases\[0\]: expected shape \(32, k\)"),
        ([eye[:, :2] * float("nan")], r"bases\[0\]: holds NaN or inf"),
    ]:
        with pytest.raises(ValueError, match=message):
            dp.attribute(IDS, Subspaces(1, bases))


def test_training_mode_with_dropout():
    model = build_model("llama", num_key_value_heads=2, attention_dropout=0.1)
    dp = DePass(model)
    assert dp.attribute(IDS, Tokens()).completeness_error < 1e-5
    model.train()
    with pytest.raises(ValueError, match=r"training mode with dropout \(attention_dropout\); call model.eval"):
        dp.attribute(IDS, Tokens())
    assert model.training
    model.eval()
    model.model.layers[1].train()  # a part is enough
    with pytest.raises(ValueError, match="training mode with dropout"):
        dp.attribute(IDS, Tokens())
    model.train()
    model.config.attention_dropout = 0.0
    assert dp.attribute(IDS, Tokens()).completeness_error < 1e-5  # training mode alone changes nothing


def test_autocast_is_refused(dp, no_work):
    calls = [
        lambda: dp.trace(IDS),
        lambda: dp.attribute(IDS, Tokens()),
        lambda: dp.decompose(IDS, Heads(1)),
        lambda: dp.attribute_generation(IDS),
        lambda: DePass(dp.model),
    ]
    for call in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="torch.autocast is on"):
            call()


def test_autocast_is_refused_with_a_trace_taken_before(dp):
    trace = dp.trace(IDS)
    state = dp.start(trace, Heads(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="torch.autocast is on"):
            dp.attribute(trace, Heads(1))
        with pytest.raises(ValueError, match="torch.autocast is on"):
            dp.carry(trace, state)
        with torch.autocast("cpu", enabled=False):
            inside = dp.attribute(trace, Heads(1))
    assert torch.equal(inside.scores, dp.attribute(trace, Heads(1)).scores)


def test_weights_that_cannot_be_read():
    model = build_model("llama", num_key_value_heads=2)
    packed = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].self_attn.v_proj.weight = packed
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.v_proj: its weight is quantised \(torch.uint8\)"):
        DePass(model)
    with torch.device("meta"):
        offloaded = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match="its weight is offloaded"):
        DePass(offloaded)


def test_ways_to_write_a_prompt_and_a_target(dp):
    oracle = dp.attribute(IDS, Tokens(), 5)
    for prompt in (tuple(IDS), torch.tensor(IDS), torch.tensor([IDS]), torch.tensor(IDS, dtype=torch.int32)):
        assert torch.equal(dp.attribute(prompt, Tokens(), torch.tensor(5)).scores, oracle.scores)
    batch = dp.attribute(torch.tensor([IDS, IDS]), Tokens(), 5)
    assert len(batch) == 2 and torch.allclose(batch[1].scores, oracle.scores, atol=1e-5)
    assert isinstance(dp.attribute([IDS], Tokens()), list)
    row = dp.model.lm_head.weight[5].detach()
    direction = dp.attribute(IDS, Tokens(), row)
    assert torch.allclose(direction.scores, oracle.scores, atol=1e-5)
    assert direction.target_names == ["direction"] and direction.target_ids == [None]
    pair = dp.attribute(IDS, Tokens(), (5, 9))
    assert torch.allclose(pair.scores, oracle.scores - dp.attribute(IDS, Tokens(), 9).scores, atol=1e-5)
    own = dp.attribute(IDS, Tokens())
    logits = dp.model(torch.tensor([IDS])).logits[0, -1].detach()
    assert own.target_ids == [int(logits.argmax())]
    assert float(own.target_logits) == pytest.approx(float(logits.max()), rel=1e-5)


def test_a_probe_reads_the_input_of_a_layer(dp):
    probe = torch.randn(32, generator=torch.Generator().manual_seed(0))
    result = dp.attribute(IDS, Tokens(), probe, end=2, position=3)
    state = dp.decompose(IDS, Tokens(), end=2).dense()[3] @ probe
    assert torch.allclose(result.scores, state, atol=1e-5)
    assert float(result.target_logits) == pytest.approx(float(dp.trace(IDS).resid(2)[3] @ probe), abs=1e-4)


def test_numpy_is_as_good_as_torch(dp):
    oracle = dp.attribute(IDS, Heads(2), 5, position=2)
    same = dp.attribute(np.array(IDS), Heads(np.int64(2)), np.array(5), position=np.int64(2))
    assert torch.equal(same.scores, oracle.scores)
    several = dp.attribute(IDS, Heads(2), np.array([5, 9]), position=2)
    assert torch.allclose(several.scores[0], oracle.scores, atol=1e-6) and several.target_ids == [5, 9]
    probe = np.random.default_rng(0).normal(size=32).astype(np.float32)
    vector = dp.attribute(IDS, Tokens(), probe).scores
    assert torch.equal(vector, dp.attribute(IDS, Tokens(), torch.from_numpy(probe)).scores)
    assert dp.attribute(IDS, Tokens(), exclude_special=[np.int64(0)]).completeness_error < 1e-5
    for wrong in (np.array([True]), 3.7):
        with pytest.raises(TypeError, match="target: expected None, a token id"):
            dp.attribute(IDS, Tokens(), wrong)


def test_rounding_is_no_component(dp):
    """A complete decomposition has no `rest`, whatever the dtypes; what is really missing has."""
    trace = dp.trace(IDS)
    x = trace.resid(1)
    split = torch.stack([0.314 * x, 0.686 * x], dim=1)
    exact = torch.stack([0.314 * x.double(), 0.686 * x.double()], dim=1)
    oracle = dp.attribute(trace, Custom(1, split)).scores
    for states, options in [(exact, {}), (split, {"state_dtype": "float64"}), (exact, {"state_dtype": "float64"})]:
        result = dp.attribute(trace, Custom(1, states), **options)
        assert result.labels == ["L1.custom0", "L1.custom1"] and result.completeness_error < 1e-5
        assert torch.allclose(result.scores.float(), oracle, atol=1e-4)
    q = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    bases = [q[:, :20], q[:, 20:]]
    spanned = dp.attribute(trace, Subspaces(1, bases))
    wide = dp.attribute(trace, Subspaces(1, bases), state_dtype="float64")
    assert spanned.labels == wide.labels == ["L1.subspace0", "L1.subspace1"]
    assert torch.allclose(spanned.scores, wide.scores.float(), atol=1e-4)
    large = 1e4 * torch.randn_like(x)
    for states in ([large, 0.95 * x - large], [(0.98 * x).bfloat16()]):
        result = dp.attribute(trace, Custom(1, torch.stack(states, dim=1)))
        assert result.labels[-1] == "rest"
    assert result.completeness_error < 1e-5


def test_labels_are_ones_own_and_differ(dp, no_work):
    states = torch.zeros(6, 2, 32)
    for labels in (["a", "a"], ["a", "rest"], ["bias", "b"]):
        with pytest.raises(ValueError, match="is taken; labels must differ"):
            dp.attribute(IDS, Custom(1, states, labels))
    for labels in ("ab", [1, 2]):
        with pytest.raises(TypeError, match="labels: expected a list of strings"):
            dp.attribute(IDS, Custom(1, states, labels))


def test_wrapped_projections():
    model = build_model("llama", num_key_value_heads=2)
    attention = model.model.layers[0].self_attn
    wrapper = torch.nn.Module()
    wrapper.base_layer, wrapper.weight = attention.v_proj, attention.v_proj.weight
    attention.v_proj = wrapper
    with pytest.raises(ValueError, match="layers.0.self_attn.v_proj: Module wraps its weight .it holds base_layer."):
        DePass(model)


def test_a_trace_belongs_to_its_model(dp):
    model = build_model("llama", num_key_value_heads=2, seed=3)
    other = DePass(model)
    trace = other.trace(IDS)
    with pytest.raises(ValueError, match="trace: it was made by another model"):
        dp.attribute(trace, Tokens())
    assert other.attribute(trace, Tokens()).completeness_error < 1e-5
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match="trace: the model's weights have changed"):
        other.attribute(trace, Tokens())


def test_what_the_propagation_makes_infinite_is_refused(dp):
    with pytest.raises(FloatingPointError, match="the components hold NaN or inf after 1 layers, though the model's"):
        dp.attribute(IDS, Tokens(), allocation=lambda gates, temperature: torch.full_like(gates.values, torch.inf))

    def wrong(gates, temperature):
        return torch.ones(1)

    with pytest.raises(ValueError, match=r"allocation: wrong must return weights \(.*\), got \(1,\)"):
        dp.attribute(IDS, Tokens(), allocation=wrong)


def test_a_state_holds_so_many_prompts(dp):
    state = dp.decompose([IDS, IDS[:2]], Tokens())
    assert len(state.labels_of(1)) == 2 and state.dense(1).shape == (2, 2, 32)
    for prompt in (-1, 2):
        with pytest.raises(IndexError, match=f"prompt: {prompt} is out of range; this state holds 2"):
            state.dense(prompt)


def test_options_are_checked_before_a_model_is_loaded():
    with pytest.raises(TypeError, match="unknown option 'temprature'"):
        DePass.from_pretrained("no/such/folder", temprature=1)


def test_what_is_no_model_is_helped():
    with pytest.raises(TypeError, match=r"got str\. DePass\.from_pretrained\(path\) loads one\."):
        DePass("HuggingFaceTB/SmolLM2-135M")
    config = AutoConfig.for_model("t5", d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=16)
    with pytest.raises(ValueError, match=r"family 't5' is not supported \(it has an encoder\)"):
        DePass(AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.parametrize(
    "path",
    [
        "/nowhere/at/all",
        "./nowhere",
        "~/nowhere at all",
        Path("nowhere"),
        "C:\\nowhere",
        "a/b/nowhere",
        "~nouser9/nowhere",
    ],
)
def test_a_folder_that_is_not_there(path):
    with pytest.raises(FileNotFoundError, match=r"path: there is no folder or file '.*nowhere"):
        DePass.from_pretrained(path)


def test_a_folder_below_home(tmp_path, monkeypatch):
    build("llama-gqa").model.save_pretrained(tmp_path / "tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert DePass.from_pretrained("~/tiny").adapter.n_layers == 3
