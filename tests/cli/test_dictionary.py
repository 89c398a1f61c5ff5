"""Features of a dictionary from a file of weights on the command line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from depass_fast import DePass, Features
from depass_fast.cli.dictionary import Dictionary, load_dictionary
from depass_fast.cli.main import main
from depass_fast.demo import load_demo
from tests.support.command import ATTRIBUTE, fail, one_thread, run  # noqa: F401 (a fixture)

PROMPT, WIDTH, COUNT = "Nyria Morstam speaks", 128, 40
HOOK = "blocks.3.hook_resid_post"
FEATURES = [*ATTRIBUTE, "--prompt", PROMPT, "--components", "features"]


def weights(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """A dictionary that was not trained; ``more`` adds weights or replaces them."""
    seed = torch.Generator().manual_seed(0)
    decoder = torch.randn(COUNT, WIDTH, generator=seed) / WIDTH**0.5
    found = {"W_enc": decoder.T.contiguous(), "W_dec": decoder, "b_enc": torch.randn(COUNT, generator=seed) / 10}
    return found | {"b_dec": torch.randn(WIDTH, generator=seed) / 10} | more


class Plain(SimpleNamespace):
    """A dictionary as a user would write it down."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        gates = (x - self.centre) @ self.W_enc + self.b_enc
        if self.k is not None:
            least = gates.relu().sort(dim=-1, descending=True).values[..., self.k - 1 : self.k]
            return torch.where(gates >= least, gates.relu(), 0)
        return torch.where(gates > self.threshold, gates.relu(), 0)

    def decode(self, activations: torch.Tensor) -> torch.Tensor:
        return activations @ self.W_dec + self.b_dec


@pytest.fixture(scope="module")
def engine():
    return DePass(*load_demo())


@pytest.mark.parametrize(
    ("file", "config", "act", "expected"),
    [
        ("sae.safetensors", None, "ReLU(x W_enc", {}),
        ("sae.npz", None, "ReLU(x W_enc", {}),
        ("params.npz", None, "JumpReLU(x W_enc", {"threshold": torch.full((COUNT,), 0.3)}),
        ("sae_weights.safetensors", {"architecture": "standard"}, "ReLU((x - b_dec) W_enc", {"centred": True}),
        (
            "sae_weights.safetensors",
            {"architecture": "topk", "k": 5, "apply_b_dec_to_input": False, "metadata": {"hook_name": HOOK}},
            "TopK(x W_enc",
            {"k": 5},
        ),
        (
            "sae_weights.safetensors",
            {"architecture": "jumprelu", "apply_b_dec_to_input": False, "hook_name": HOOK},
            "JumpReLU(x W_enc",
            {"threshold": torch.full((COUNT,), 0.2)},
        ),
    ],
)
def test_features_are_those_of_the_same_dictionary_in_python(capsys, tmp_path, engine, file, config, act, expected):
    threshold = expected.get("threshold")
    tensors = weights() if threshold is None else weights(threshold=threshold)
    if file.endswith("npz"):
        np.savez(tmp_path / file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        save_file(tensors, tmp_path / file)
    given = tmp_path / file
    if config is not None:
        (tmp_path / "cfg.json").write_text(json.dumps(config))
        given = tmp_path
    place = ["--layer", HOOK] if "hook_name" not in json.dumps(config) else []
    assert run(capsys, *FEATURES, "--dictionary", str(given), *place)
    found = json.loads(run(capsys, *FEATURES, "--dictionary", str(given), *place, "--json"))
    same = Plain(
        **{"threshold": 0.0} | tensors,
        centre=tensors["b_dec"] if expected.get("centred") else 0.0,
        k=expected.get("k"),
    )
    result = engine.attribute(PROMPT, Features(layer=HOOK, sae=same))
    assert found["labels"] == result.labels and "rest" in found["labels"]
    assert found["scores"] == pytest.approx(result.scores.tolist(), abs=1e-4)
    assert act in load_dictionary(given, "cpu")[1]


def test_biases_may_be_missing_and_halves_stay_halves(tmp_path):
    path = tmp_path / "sae.safetensors"
    save_file({name: weights()[name].bfloat16() for name in ("W_enc", "W_dec")}, path)
    found, _ = load_dictionary(path, "cpu")
    assert isinstance(found, Dictionary) and found.b_dec.dtype == torch.bfloat16
    assert not found.b_enc.any() and not found.b_dec.any() and found.threshold is None


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({"encoder.weight": torch.zeros(2, 2)}, ["encoder.weight", "W_enc (D, F)"]),
        (weights(scaling_factor=torch.ones(COUNT)), ["scaling_factor"]),
        (weights(W_enc=weights()["W_dec"]), ["W_enc", "(128, 40)", "(40, 128)"]),
        (weights(b_dec=torch.zeros(3)), ["b_dec", "(128,)"]),
        (weights(b_dec=torch.zeros(WIDTH, dtype=torch.long)), ["b_dec", "int64"]),
        (weights(W_enc=torch.zeros(64, COUNT), W_dec=torch.zeros(COUNT, 64), b_dec=torch.zeros(64)), ["128"]),
    ],
)
def test_weights_that_are_none(capsys, tmp_path, tensors, parts):
    save_file(tensors, tmp_path / "sae.safetensors")
    message = _error(capsys, "--dictionary", str(tmp_path / "sae.safetensors"), "--layer", HOOK)
    assert all(part in message for part in ["--dictionary:", *parts]), message


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"architecture": "gated"}, ["architecture", "'gated'", "Features(sae=...)"]),
        ({"normalize_activations": "layer_norm"}, ["normalize_activations"]),
        ({"activation_fn_str": "tanh-relu"}, ["activation_fn"]),
        ({"architecture": "topk"}, ["k is None"]),
        ({"architecture": "topk", "k": 41}, ["k = 41", "40"]),
        ({"architecture": "jumprelu"}, ["threshold"]),
        ([], ["no object"]),
    ],
)
def test_an_encoding_that_is_not_here_is_refused(capsys, tmp_path, config, parts):
    save_file(weights(), tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    message = _error(capsys, "--dictionary", str(tmp_path), "--layer", HOOK)
    assert all(part in message for part in ["--dictionary:", *parts]), message


def test_a_threshold_that_the_config_does_not_know(capsys, tmp_path):
    save_file(weights(threshold=torch.ones(COUNT)), tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text("{}")
    assert "holds a threshold" in _error(capsys, "--dictionary", str(tmp_path), "--layer", HOOK)


def test_a_place_is_needed(capsys, tmp_path):
    path = tmp_path / "sae.safetensors"
    save_file(weights(), path)
    for layer in ([], ["--layer", "3"]):
        assert "--layer: the dictionary does not say" in _error(capsys, "--dictionary", str(path), *layer)
    for layer in ("6", "blocks.9.hook_resid_pre"):
        message = _error(capsys, "--dictionary", str(path), "--layer", layer, "--site", "resid_pre")
        assert "--layer:" in message and "0 to 5" in message
    assert "--layer: a dictionary" in _error(capsys, "--dictionary", str(path), "--layer", "all")
    assert "--site:" in _error(capsys, "--dictionary", str(path), "--layer", HOOK, "--site", "resid_pre")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--dictionary: features need"),
        (["--dictionary", "no_such.npz"], "--dictionary: there is no file"),
        (["--dictionary", __file__], "--dictionary: "),
    ],
)
def test_errors_come_before_any_model(capsys, monkeypatch, arguments, part):
    monkeypatch.setattr("depass_fast.cli.attribute.engine_of", lambda *_: pytest.fail("a model was loaded"))
    assert part in fail(capsys, *FEATURES, *arguments)


def test_a_dictionary_belongs_to_features(capsys, tmp_path):
    tokens = [*ATTRIBUTE, "--prompt", PROMPT, "--components", "tokens"]
    assert "--dictionary: it belongs" in fail(capsys, *tokens, "--dictionary", str(tmp_path))
    assert "--site: it belongs" in fail(capsys, *tokens, "--site", "resid_pre")
    assert "sae_weights.safetensors" in fail(capsys, *FEATURES, "--dictionary", str(tmp_path), "--layer", HOOK)
    (tmp_path / "sae.npz").write_bytes(b"nothing of use")
    assert "no archive" in fail(capsys, *FEATURES, "--dictionary", str(tmp_path / "sae.npz"), "--layer", HOOK)


def _error(capsys, *arguments: str) -> str:
    assert main([*FEATURES, *arguments]) == 2
    return capsys.readouterr().err
