"""A recurrence in half precision is compared with the model's own code in float32, and a small fault is seen."""

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from depass_fast import DePass
from depass_fast.adapters import recurrent
from depass_fast.adapters.families import falcon_h1
from depass_fast.trace import consistency, end_check
from depass_fast.trace.mixer_check import heads_in_float32
from tests.support.family_models import VARIANTS, available, build_model, build_variant
from tests.support.models import random_ids

pytestmark = pytest.mark.skipif(not recurrent.knows_recurrences(), reason="the installed transformers is too old")

IDS = random_ids(12, seed=3)


def with_activation(name, key, act):
    if not available(name):
        pytest.skip(f"the installed transformers does not know {name}")
    model_type, changes = VARIANTS[name]
    return build_model(model_type, 0, **{**changes, key: act}).to(torch.bfloat16)


def test_another_end_in_half_precision_may_be_the_rounding_of_recurrences(monkeypatch):
    monkeypatch.setattr(end_check, "_RECURRENT", 1e-9)
    dp = DePass(build_variant("mamba2"))
    dp.trace(IDS)
    with pytest.raises(RuntimeError, match=r"ends otherwise .* It may also be rounding: .* recurrences .*float\(\)"):
        DePass(dp.model.bfloat16()).trace(IDS)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("granitemoehybrid: state spaces", "hidden_act"),
        ("falcon_h1", "hidden_act"),
        ("nemotron_h", "mamba_hidden_act"),
    ],
)
def test_another_activation_than_the_declared_one_is_seen_in_half_precision(name, key, monkeypatch):
    for module in (recurrent, falcon_h1):
        monkeypatch.setattr(module, "value_ratio", lambda name: torch.sigmoid)
    monkeypatch.setattr(recurrent, "curve", lambda mixer: silu)
    with pytest.raises(RuntimeError, match="layer 0: .* gives its output projection something else.* also in float32"):
        DePass(with_activation(name, key, "gelu"), progress=False).trace(IDS)


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "jamba", "falcon_h1", "minimax", "recurrent_gemma", "rwkv"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.thorough)], ids=["bf16", "f16"]
)
def test_both_agree_in_one_layer_of_every_class(name, dtype, monkeypatch):
    if not available(name):
        pytest.skip(f"the installed transformers does not know {name}")
    found, compare = [], consistency.Consistency.compare

    def noted(self, what, got, expected, *sizes, tolerance=None):
        compare(self, what, got, expected, *sizes, tolerance=tolerance)
        found.append((what, float(self.errors[-1].detach()), self.allowed[-1]))

    monkeypatch.setattr(consistency.Consistency, "compare", noted)
    DePass(build_variant(name).to(dtype), progress=False).trace([IDS, IDS[:5]])
    errors = [(error, allowed) for what, error, allowed in found if "in float32" in what]
    assert len(errors) == 1
    assert errors[0][0] < errors[0][1] / 3


def test_a_mixer_beside_attention_is_compared_with_the_models_own():
    if not available("falcon_h1"):
        pytest.skip("the installed transformers does not know falcon_h1")
    model = build_variant("falcon_h1")
    last = model.get_submodule("model.layers.1.mamba.out_proj")
    last.register_forward_pre_hook(lambda module, args: (args[0] * 1.05,))
    with pytest.raises(RuntimeError, match="layer 1: model.layers.1.mamba gives its output projection something else"):
        DePass(model, progress=False).trace(IDS)


class HalfOnly(nn.Module):
    """A mixer whose code is for half precision, or reads a cache."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.only_half = True

    def forward(self, x, cache=None):
        x = self.inner(x)
        assert not self.only_half or x.dtype == torch.bfloat16
        return self.outer(x * 2)


def test_a_call_that_cannot_be_repeated_is_left_alone():
    mixer, x = HalfOnly().bfloat16(), torch.randn(1, 3, 4).bfloat16()
    given: dict[nn.Module, torch.Tensor] = {mixer.inner: mixer.inner(x)[0]}
    mixer.register_forward_hook(lambda *_: pytest.fail("the model's own hooks are not called"))
    assert heads_in_float32(mixer, given, mixer.outer, (x,), {}) is None
    mixer.only_half = False
    assert heads_in_float32(mixer, given, mixer.outer, (x,), {"cache": object()}) is None
    heads = heads_in_float32(mixer, given, mixer.outer, (x,), {"cache": None})
    assert heads is not None
    assert torch.equal(heads, given[mixer.inner].float() * 2)
    assert {p.dtype for p in mixer.parameters()} == {torch.bfloat16}
