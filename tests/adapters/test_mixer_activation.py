"""Another activation than SiLU behind a recurrence's convolution: decomposed as it is, or refused by name."""

import pytest
import torch
from transformers import AutoConfig
from transformers.activations import ACT2FN

from depass_fast import DePass, Tokens
from depass_fast.adapters.families import mamba2, minimax, nemotron_h, zamba
from depass_fast.adapters.mixer_activation import value_ratio
from depass_fast.adapters.recurrent import knows_recurrences
from tests.support.family_models import VARIANTS, available, build_model
from tests.support.models import random_ids

pytestmark = pytest.mark.skipif(not knows_recurrences(), reason="the installed transformers is too old")

IDS = random_ids(9, seed=3)
OTHERS = [  # variant, the config's name of the activation, one that is not SiLU
    ("qwen3_next", "hidden_act", "gelu"),
    ("mamba2", "hidden_act", "relu"),
    ("jamba", "hidden_act", "gelu"),
    ("nemotron_h", "mamba_hidden_act", "gelu"),
    ("falcon_h1", "hidden_act", "gelu"),
    ("minimax", "hidden_act", "quick_gelu"),
    ("zamba", "hidden_mamba_act", "tanh"),
    ("kimi_linear", "hidden_act", "linear"),
]
SAME_CODE = [  # as one of the others
    (name, "hidden_act", "gelu")
    for name in ("qwen3_5_text", "mamba", "falcon_mamba", "bamba", "granitemoehybrid: state spaces", "olmo_hybrid")
] + [(name, "hidden_act", "gelu") for name in ("bailing_hybrid", "qwen4_exp_text", "zamba2")]


def built(name, key, act):
    if not available(name):
        pytest.skip(f"the installed transformers does not know {name}")
    model_type, changes = VARIANTS[name]
    return build_model(model_type, 0, **{**changes, key: act})


@pytest.mark.parametrize(
    ("name", "key", "act"), [*OTHERS, *(pytest.param(*one, marks=pytest.mark.thorough) for one in SAME_CODE)]
)
def test_a_mixer_is_decomposed_with_the_activation_that_it_has(name, key, act):
    model = built(name, key, act)
    dp = DePass(model, progress=False)
    trace = dp.trace(IDS)
    with torch.no_grad():
        own = model(torch.tensor([IDS]), use_cache=False).logits[0]
    assert torch.allclose(dp.adapter.logits(trace.normed_final), own, rtol=0, atol=1e-5 * float(own.abs().max()))
    assert dp.attribute(trace, Tokens(), 5).completeness_error < 1e-5


@pytest.mark.parametrize(
    "act", ["gelu", "relu", "relu2", "tanh", "mish", "leaky_relu", "silu", "hardswish", "gelu_new"]
)
def test_a_ratio_times_its_value_is_the_activation(act):
    ratio, c = value_ratio(act), torch.tensor([-30.0, -2.0, -1e-20, 0.0, 1e-20, 1e-3, 0.7, 40.0], dtype=torch.float64)
    assert ratio is not None
    assert ratio(c).isfinite().all()
    assert torch.allclose(ratio(c) * c, ACT2FN[act](c), rtol=1e-14, atol=0)
    slope = (ACT2FN[act](torch.tensor(1e-7, dtype=torch.float64)) / 1e-7).item()
    assert ratio(c)[3].item() == pytest.approx(slope, abs=1e-6)  # its limit from above


@pytest.mark.parametrize(
    ("declare", "config", "message"),
    [
        (mamba2.declare, {"model_type": "mamba2", "hidden_act": "sigmoid"}, "'sigmoid' .* does not vanish at zero"),
        (zamba.declare, {"model_type": "zamba", "hidden_mamba_act": "laplace"}, "'laplace' .* does not vanish at zero"),
        (minimax.declare, {"model_type": "minimax", "hidden_act": "prelu"}, "'prelu' .* has weights of its own"),
        (nemotron_h.declare, {"model_type": "nemotron_h", "mamba_hidden_act": "own"}, "'own' .* is not known"),
    ],
)
def test_an_activation_that_no_ratio_stands_for_is_refused_by_name(declare, config, message):
    with pytest.raises(ValueError, match=f"model: the activation {message}"):
        declare(AutoConfig.for_model(**config))
