"""A forward pass that is not what its family declares is refused, and the error names the module."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from depass_fast import DePass, Heads
from depass_fast.trace import consistency
from depass_fast.trace.activations import check_activations
from tests.support.family_models import VARIANTS, available, build_model, build_variant
from tests.support.forks import fork
from tests.support.models import random_ids
from tests.support.recurrent_models import RECURRENT

IDS = random_ids(8)


class Gated(modeling_llama.LlamaAttention):
    """Attention with a gate on its output."""

    def forward(self, hidden_states, **kwargs):
        out, weights = super().forward(hidden_states, **kwargs)
        return out * 0.5, weights


class Twice(nn.Module):
    """A wrapper that scales the output of a module."""

    def __init__(self, inner, factor=1.5):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) * self.factor

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


def changed_attention(layer):
    layer.self_attn.__class__ = Gated


def changed_values(layer):
    original = layer.self_attn.forward

    def forward(hidden_states, **kwargs):
        own = modeling_llama.ALL_ATTENTION_FUNCTIONS[layer.self_attn.config._attn_implementation]

        def changed(module, query, key, value, *args, **rest):
            return own(module, query, key, value * 1.05, *args, **rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(modeling_llama.ALL_ATTENTION_FUNCTIONS), "get_interface", lambda *_: changed)
            return original(hidden_states, **kwargs)

    layer.self_attn.forward = forward


def changed_heads(layer):
    layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * 0.95,))


def changed_mlp(layer):
    layer.mlp = Twice(layer.mlp)


def changed_norm(layer):
    norm = layer.input_layernorm
    norm.forward = lambda x, forward=norm.forward: forward(x) * 1.05


def changed_mlp_norm(layer):
    norm = layer.post_attention_layernorm
    norm.forward = lambda x, forward=norm.forward: forward(x) + 0.05


def changed_layer(layer):
    layer.register_forward_hook(lambda module, args, out: out + 1.0 if torch.is_tensor(out) else (out[0] + 1.0,))


CHANGES = {
    changed_attention: "layer 1: model.layers.1.self_attn writes something else than what the residual stream gains",
    changed_values: "layer 1: model.layers.1.self_attn changes the values between their projection and the heads",
    changed_heads: "layer 1: model.layers.1.self_attn gives its output projection something else",
    changed_mlp: "layer 1: model.layers.1.mlp writes something else than what the residual stream gains",
    changed_norm: "layer 1: model.layers.1.self_attn.v_proj reads something else than the norm",
    changed_mlp_norm: "layer 1: model.layers.1.mlp reads something else than the norm",
    changed_layer: "layer 1: model.layers.1.mlp writes something else than what the residual stream gains",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_forward_pass_is_refused_by_name(change, dtype):
    if change is changed_values and not hasattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface"):
        pytest.skip("this transformers looks its attention function up in another way")
    model = fork().to(dtype)
    change(model.model.layers[1])
    with pytest.raises(RuntimeError, match=CHANGES[change]):
        DePass(model).attribute(IDS, Heads(1))


def test_a_changed_final_norm():
    model = fork()
    model.model.norm.forward = lambda x, forward=model.model.norm.forward: forward(x) * 1.05
    with pytest.raises(RuntimeError, match="the final norm gives something else than its formula"):
        DePass(model).trace(IDS)


def test_attention_that_does_not_call_the_interface():
    model = fork()
    attention = model.model.layers[2].self_attn
    attention.forward = lambda hidden_states, **_: (attention.o_proj(attention.q_proj(hidden_states)), None)
    with pytest.raises(RuntimeError, match="layer 2: the forward pass recorded no attention"):
        DePass(model).trace(IDS)


@pytest.mark.parametrize("name", ["qwen3_5_text", "afmoe"])
def test_gated_attention_that_does_not_call_the_interface(name):
    if not available(name):
        pytest.skip(f"the installed transformers does not know {name}")
    model = build_variant(name)
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (
        attention.o_proj(attention.v_proj(hidden_states).repeat(1, 1, attention.num_key_value_groups)),
        None,
    )
    with pytest.raises(RuntimeError, match="layer 1: the forward pass recorded no attention"):
        DePass(model).trace(IDS)


@pytest.mark.skipif(not available("mamba2"), reason="the installed transformers is too old")
def test_a_mixer_whose_projection_is_not_called():
    model = build_variant("mamba2")
    mixer = model.backbone.layers[1].mixer
    mixer.forward = lambda hidden_states, **_: mixer.out_proj(hidden_states.repeat(1, 1, 2))
    with pytest.raises(RuntimeError, match="layer 1: the forward pass called no in_proj of backbone.layers.1.mixer"):
        DePass(model).trace(IDS)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "ALiBi" in name or name in ("bloom", "mpt", "gptj")])
def test_observed_attention_is_compared_with_the_models_own(name):
    """Ours takes its place: a fork's own would silently be overwritten."""
    model = build_variant(name)
    dp = DePass(model)
    dp.trace(IDS)
    o_proj = dp.adapter.module(1, "o_proj")
    own = o_proj.forward
    handle = o_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.05,))
    if dp.adapter.observed is None:
        pytest.skip("not observed in this transformers")
    with pytest.raises(RuntimeError, match="layer 1: .* gives its output projection something else"):
        dp.trace(IDS)
    handle.remove()
    o_proj.forward = own


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.bfloat16, marks=pytest.mark.once_a_family),
        pytest.param(torch.float32, marks=pytest.mark.once_a_file),
        pytest.param(torch.float16, marks=pytest.mark.thorough),
        pytest.param(torch.float64, marks=pytest.mark.thorough),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", VARIANTS)
def test_no_supported_model_is_refused(name, dtype, monkeypatch):
    """Differences stay below half of what is allowed."""
    if not available(name):
        pytest.skip("the installed transformers does not have it")
    rounds_more = name in RECURRENT and dtype.itemsize < 4  # its own logits are off by as much from those in float32
    if not rounds_more:
        monkeypatch.setattr("depass_fast.trace.consistency.Consistency.verdict", lower_verdict)
    dp = DePass(build_variant(name).to(dtype))
    try:
        trace = dp.trace([random_ids(n, seed=n) for n in (1, 40, 7)])
    except RuntimeError as error:
        with pytest.raises(RuntimeError):  # the model itself does not run either
            dp.model(torch.tensor([random_ids(7)]))
        pytest.skip(f"transformers itself: {error}")
    check_activations(dp.adapter, trace)


def lower_verdict(self, consequence: str = "", advice: str = "") -> None:
    for name, error, allowed in zip(self.names, self.errors, self.allowed, strict=True):
        assert float(error.detach()) <= allowed / 2, (name, float(error), allowed)


def test_a_model_is_looked_at_again_where_it_has_changed():
    """Once is enough for the same code, the same hooks and prompts that are not twice as long."""
    model, seen = build_model("llama", num_key_value_heads=2), []
    check = consistency.check

    def counted(*arguments):
        seen.append(arguments)
        return check(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(consistency, "check", counted)
        dp = DePass(model)
        for length, expected in ((8, 1), (9, 1), (15, 1), (16, 2), (8, 2)):
            dp.trace(random_ids(length))
            assert len(seen) == expected
        handle = model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
        with pytest.raises(RuntimeError, match="layer 1: model.layers.1.mlp writes something else"):
            dp.trace(random_ids(8))
        with pytest.raises(RuntimeError, match="layer 1"):  # a refusal is not forgotten
            dp.trace(random_ids(8))
        handle.remove()
        dp.trace(random_ids(8))
        model.model.layers[0].mlp.forward = lambda x: x
        with pytest.raises(RuntimeError, match="layer 0"):
            dp.trace(random_ids(8))


@pytest.mark.parametrize("register", [register_module_forward_pre_hook, register_module_forward_hook])
def test_hooks_on_all_modules_are_noticed(register):
    model = build_model("llama", num_key_value_heads=2)
    dp, changed = DePass(model), model.model.layers[1].mlp
    dp.trace(IDS)
    before = register is register_module_forward_pre_hook
    expected = "reads" if before else "writes"

    def double(module, args, output=None):
        return None if module is not changed else (2 * args[0],) if before else 2 * output

    handle = register(double)
    try:
        with pytest.raises(RuntimeError, match=f"layer 1: model.layers.1.mlp {expected} something else"):
            dp.trace(IDS)
    finally:
        handle.remove()
    dp.trace(IDS)


def own_attention(looks_ahead: bool, layer: int = 1, window: int | None = None):
    """A fork's own attention function, as transformers takes them; in one layer it may have another mask."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        here, n = module.layer_idx == layer, query.shape[2]
        mask = torch.ones(n, n, dtype=torch.bool).tril_()
        if here:
            mask = torch.ones_like(mask) if looks_ahead else mask if window is None else mask.triu(1 - window)
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    return attend


@pytest.mark.parametrize("looks_ahead", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_forks_own_attention_function(dtype, looks_ahead, monkeypatch):
    """The recorder's attention takes its place: both must end alike, or the trace is of another model."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "own", own_attention(looks_ahead))
    model = fork().to(dtype)
    model.config._attn_implementation = "own"
    if looks_ahead:
        with pytest.raises(RuntimeError, match="ends otherwise than the ordinary one"):
            DePass(model).trace(IDS)
    else:
        dp = DePass(model)
        own = model(torch.tensor([IDS]), use_cache=False).logits[0]
        assert torch.allclose(dp.adapter.logits(dp.trace(IDS).normed_final), own, atol=1e-5)
    assert model.config._attn_implementation == "own"


def mixture(seed: int, dtype: torch.dtype) -> nn.Module:
    """Many small experts: in half precision some router is near a tie at some of 60 positions."""
    return build_model("mixtral", seed, "eager", num_key_value_heads=2, num_local_experts=8).to(dtype)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_choice_near_a_tie_is_no_other_model(dtype, seed):
    torch.manual_seed(1)
    DePass(mixture(seed, dtype)).trace(torch.randint(0, 60, (60,)))


def test_weights_of_a_sparse_mixer_may_jump_between_the_same_experts():
    if not available("phimoe: window"):
        pytest.skip("the installed transformers does not have it")
    torch.manual_seed(1)
    ids = torch.randint(0, 60, (60,))
    for seed in (1, 3):
        DePass(build_variant("phimoe: window", seed, "eager").to(torch.bfloat16)).trace(ids)


@pytest.mark.parametrize("mask", [{"looks_ahead": True}, {"looks_ahead": False, "window": 20}], ids=str)
@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_another_mask_of_a_mixture_is_found(dtype, layer, mask, monkeypatch):
    """Routers decide otherwise because of the mask; in half precision they may do so without it, too."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "own", own_attention(**mask, layer=layer))
    torch.manual_seed(1)
    ids = torch.randint(0, 60, (60,))
    for seed in range(4):
        model = mixture(seed, dtype)
        model.config._attn_implementation = "own"
        with pytest.raises(RuntimeError, match="ends otherwise than the ordinary one"):
            DePass(model).trace(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_that_is_told_not_to_be_causal(dtype):
    """The oldest transformers do not read `is_causal` in sdpa attention: there the model is as it was, and traced."""
    model, ids = fork().to(dtype), torch.tensor([IDS])
    model.config._attn_implementation = "sdpa"
    own = model(ids, use_cache=False).logits
    model.model.layers[1].self_attn.is_causal = False
    if '"is_causal"' in inspect.getsource(sdpa_attention.sdpa_attention_forward):
        assert not torch.allclose(model(ids, use_cache=False).logits, own, atol=0.1)
        with pytest.raises(RuntimeError, match="ends otherwise than the ordinary one"):
            DePass(model).trace(IDS)
    else:
        assert torch.equal(model(ids, use_cache=False).logits, own)
        dp = DePass(model)
        assert torch.allclose(dp.adapter.logits(dp.trace(IDS).normed_final), own[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_the_final_norm_does_otherwise_is_noticed(dtype):
    model = fork().to(dtype)
    model.model.norm.forward = lambda x, forward=model.model.norm.forward: forward(x) * 1.5
    with pytest.raises(RuntimeError, match="final norm gives something else|ends otherwise than the ordinary one"):
        DePass(model).trace(IDS)


@pytest.mark.parametrize("part", ["self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_a_projection_that_is_not_its_weight(part):
    model = fork()
    module = model.model.layers[1].get_submodule(part)
    module.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(RuntimeError, match=f"layer 1: model.layers.1.{part} computes something else than its weight"):
        DePass(model).trace(IDS)
