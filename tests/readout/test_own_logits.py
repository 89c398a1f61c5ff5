"""Targets are read as the model reads them: a change of its logits behind the final norm is refused."""

import copy
import threading
from functools import wraps

import pytest
import torch
from torch import nn

from depass_fast import DePass, Heads, Neurons, Tokens
from depass_fast.readout import own
from depass_fast.trace.unembedding import is_plain, own_logits
from tests.support.family_models import VARIANTS, available, build_model, build_variant
from tests.support.models import random_ids

IDS = random_ids(8)
OTHER = 7  # a token that the hooks below make likely


class Cosine(nn.Linear):
    """A head of unit rows that reads unit states."""

    def forward(self, x):
        return 10 * nn.functional.linear(
            nn.functional.normalize(x, dim=-1), nn.functional.normalize(self.weight, dim=-1)
        )


def bias(vocabulary):
    return torch.linspace(-3, 3, vocabulary)


def capped(logits):
    return 2 * torch.tanh(logits / 2)


def on_output(change):
    def hook(module, args, output):
        output.logits = change(output.logits)
        return output

    return lambda model: model.register_forward_hook(hook)


def on_head(change):
    return lambda model: model.lm_head.register_forward_hook(lambda module, args, output: change(output))


def before_head(change):
    return lambda model: model.lm_head.register_forward_pre_hook(lambda module, args: (change(args[0]),))


def cosine_head(model):
    model.lm_head.__class__ = Cosine


def changed_class(model):
    class Scaled(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model.__class__ = Scaled


def steering(x):
    return x + 3 * torch.sin(torch.arange(x.shape[-1]))


CHANGES = {
    "scale, on the model": on_output(lambda logits: 2 * logits),
    "scale, on the head": on_head(lambda logits: 2 * logits),
    "bias": on_head(lambda logits: logits + bias(logits.shape[-1])),
    "scale before the head": before_head(lambda x: 0.5 * x),
    "steering before the head": before_head(steering),
    "cap": on_output(capped),
    "normalised": on_output(lambda logits: logits.log_softmax(-1)),
    "on the decoder": lambda model: model.model.register_forward_hook(
        lambda module, args, output: type(output)(last_hidden_state=2 * output.last_hidden_state)
    ),
    "cosine head": cosine_head,
    "subclass": changed_class,
}


@pytest.fixture
def model():
    return copy.deepcopy(build_model("llama", num_key_value_heads=2))


@pytest.mark.parametrize("method", ["exact", "adjoint"])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("target", [None, 5, (5, 9)])
def test_no_logit_but_the_model_s(model, name, target, method):
    CHANGES[name](model)
    logits = model(torch.tensor([IDS])).logits[0, -1]
    kind = Tokens() if method == "exact" else Neurons(1)
    with pytest.raises(ValueError, match="target: the model gives .* the logit .* its unembedding .* shape .32,.") as e:
        DePass(model).attribute(IDS, kind, target, method=method)
    told = float(str(e.value).split("the logit ")[1].split(",")[0])
    asked = logits.max() if target is None else logits[target if target == 5 else list(target)]
    assert (asked.flatten() - told).abs().min() < 1e-3  # the model's own logit, with what was put on it


@pytest.mark.parametrize("name", CHANGES)
def test_a_direction_is_none_of_the_model_s_logits(model, name):
    plain = DePass(build_model("llama", num_key_value_heads=2))
    direction = model.lm_head.weight[5].detach().clone()
    CHANGES[name](model)
    got, wanted = (dp.attribute(IDS, Tokens(), direction) for dp in (DePass(model), plain))
    assert torch.equal(got.scores, wanted.scores)


def test_the_error_names_the_hook(model):
    CHANGES["steering before the head"](model)
    with pytest.raises(ValueError, match="a forward pre-hook on lm_head changes"):
        DePass(model).attribute(IDS, Heads(1))


def test_the_next_token_is_the_model_s(model):
    """A token that a hook forbids is not the target; the others' logits are as they were, and so are their shares."""
    dp = DePass(model)
    best = dp.attribute(IDS, Tokens())
    handle = model.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor(best.target_ids), -torch.inf)
    )
    second = dp.attribute(IDS, Tokens())
    assert second.target_ids == model(torch.tensor([IDS])).logits[0, -1:].argmax(-1).tolist() != best.target_ids
    handle.remove()
    assert torch.equal(dp.attribute(IDS, Tokens(), second.target_ids[0]).scores, second.scores)
    assert dp.attribute(IDS, Tokens()).target_ids == best.target_ids


def test_every_prompt_and_position_is_compared(model):
    """A hook on the last position acts on each prompt's, as it does where the model continues that prompt."""
    model.lm_head.register_forward_hook(
        lambda module, args, output: torch.cat([output[:, :-1], output[:, -1:] + 1.0], dim=1)
    )
    with pytest.raises(ValueError, match="a forward hook on lm_head"):
        DePass(model).attribute([IDS, IDS[2:]], Tokens(), 3)
    with pytest.raises(ValueError, match="a forward hook on lm_head"):
        DePass(model).attribute_generation(IDS, max_new_tokens=2)


def test_a_hook_that_changes_the_input_is_refused(model):
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "input_ids": kwargs["input_ids"] * 0}), with_kwargs=True
    )
    with pytest.raises(ValueError, match="a hook on LlamaForCausalLM changes its input"):
        DePass(model).attribute(IDS, Tokens(), 3)


def other_token(ids):
    """One token is another, which is not the last."""
    return {"input_ids": torch.where(ids == IDS[2], OTHER, ids)}


def mask(ids):
    return {"attention_mask": (torch.arange(ids.shape[1], device="cpu") != 1).long().expand_as(ids)}


def positions(ids):
    return {"position_ids": 2 * torch.arange(ids.shape[1], device="cpu")[None]}


def usual(ids):
    return {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1], device="cpu")[None]}


def before_model(change):
    def hook(module, args, kwargs):
        return args, {**kwargs, **change(kwargs["input_ids"])}

    return lambda model: model.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("change", [other_token, mask, positions])
@pytest.mark.parametrize("method", ["exact", "adjoint"])
def test_a_hook_that_changes_an_earlier_input_is_refused(model, change, method):
    ids, kind = torch.tensor([IDS]), Tokens() if method == "exact" else Neurons(1)
    plain = model(input_ids=ids).logits[0, -1, 3]
    before_model(change)(model)
    assert (model(input_ids=ids).logits[0, -1, 3] - plain).abs() > 1e-4
    for prompt in (IDS, [IDS[-1:], IDS]):
        with pytest.raises(ValueError, match="a hook on LlamaForCausalLM changes its input"):
            DePass(model).attribute(prompt, kind, 3, method=method)


def test_a_hook_may_name_the_usual_mask_and_positions(model):
    wanted = DePass(model).attribute([IDS, IDS[2:]], Tokens(), 3)
    before_model(usual)(model)
    for got, plain in zip(DePass(model).attribute([IDS, IDS[2:]], Tokens(), 3), wanted, strict=True):
        assert torch.equal(got.scores, plain.scores)


def raised(at):
    """A change of the logits at one position."""

    def change(logits):
        logits = logits.clone()
        logits[:, at] += 5
        return logits

    return change


PLACES = {"on the model": on_output, "on the head": on_head}


@pytest.mark.parametrize("where_put", PLACES)
@pytest.mark.parametrize("method", ["exact", "adjoint"])
def test_a_hook_is_shown_the_whole_prompt(model, where_put, method):
    """It may name a position, and acts on that one alone."""
    kind = Tokens() if method == "exact" else Neurons(1)
    plain = DePass(build_model("llama", num_key_value_heads=2))
    for at, spared in ((3, 2), (-1, 2)):
        handle = PLACES[where_put](raised(at))(model)
        dp = DePass(model)
        for position in (at, [spared, at]):
            with pytest.raises(ValueError, match="a forward hook on"):
                dp.attribute(IDS, kind, 3, position=position, method=method)
        for position in (spared, [spared, 0, spared]):
            got, wanted = (one.attribute(IDS, kind, 3, position=position, method=method) for one in (dp, plain))
            pairs = zip(got, wanted, strict=True) if isinstance(position, list) else [(got, wanted)]
            assert all(torch.equal(one.scores, other.scores) for one, other in pairs)
        handle.remove()
    with pytest.raises(ValueError, match="a forward hook on"):
        PLACES[where_put](raised(-1))(model)
        DePass(model).attribute([IDS, IDS[2:]], kind, 3, position=[0, -1], method=method)


@pytest.mark.parametrize("where_put", [*PLACES, "on the decoder"])
def test_a_hook_for_longer_prompts_is_seen(model, where_put):
    """It acts where the model reads the prompt, and not where it generates."""
    if where_put == "on the decoder":
        model.model.register_forward_hook(
            lambda module, args, output: type(output)(
                last_hidden_state=output.last_hidden_state * (1 + (output.last_hidden_state.shape[1] > 1))
            )
        )
    else:
        PLACES[where_put](lambda logits: logits + 5 * (logits.shape[1] > 1))(model)
    dp, told = DePass(model), "changes what follows the final norm"
    for method, kind in (("exact", Tokens()), ("adjoint", Neurons(1))):
        with pytest.raises(ValueError, match=told):
            dp.attribute([IDS[1:], IDS], kind, 3, position=[1, -1], method=method)
        with pytest.raises(ValueError, match=told):
            dp.attribute(IDS, kind, continuation=[4, 9], method=method)
    with pytest.raises(ValueError, match=told):
        dp.attribute_generation(IDS, max_new_tokens=2)
    assert dp.attribute(IDS[:1], Tokens(), 3).completeness_error < 1e-5


def test_a_log_probability_is_the_model_s_in_the_whole_prompt(model):
    """The logits of other tokens are raised, at one position."""

    def change(logits):
        logits = logits.clone()
        logits[:, len(IDS), 10:] += 5
        return logits

    on_head(change)(model)
    with pytest.raises(ValueError, match="target: the logsumexp of the model's logits"):
        DePass(model).attribute(IDS, Tokens(), continuation=[4, 9])
    assert DePass(model).attribute(IDS, Tokens(), continuation=[4]).sum


def test_only_what_a_user_put_there_is_shown_whole_prompts(model, monkeypatch):
    found = []
    shapes = lambda adapter, ids, hidden: found.append(tuple(ids.shape)) or own_logits(adapter, ids, hidden)  # noqa: E731
    monkeypatch.setattr(own, "own_logits", shapes)
    dp = DePass(model)

    def asked():
        found.clear()
        dp.attribute([IDS, IDS[2:]], Tokens(), 3, position=[1, -1])
        return found

    assert asked() == [(4, 1)] and is_plain(dp.adapter)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert asked() == [(1, 8), (1, 6)]
    handle.remove()
    forward = model.forward
    model.forward = wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))
    assert not is_plain(dp.adapter)
    del model.forward
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", wraps(type(model).forward)(lambda self, **kwargs: None))
        assert not is_plain(dp.adapter)
    assert is_plain(dp.adapter)
    model.model.register_forward_hook(lambda *_: None)
    assert asked() == [(1, 8), (1, 6)]


@pytest.mark.parametrize("name", [name for name in VARIANTS if available(name)][::9])
def test_no_family_has_code_of_a_user_s(name):
    assert is_plain(DePass(build_variant(name)).adapter)


def test_a_hook_that_the_trace_has_seen_is_fine(model):
    model.model.layers[1].register_forward_hook(
        lambda module, args, output: (
            steering(output) if isinstance(output, torch.Tensor) else (steering(output[0]), *output[1:])
        )
    )
    plain = build_model("llama", num_key_value_heads=2)
    with pytest.raises(RuntimeError, match="residual stream"):
        DePass(model).attribute(IDS, Tokens(), 3)
    assert DePass(plain).attribute(IDS, Tokens(), 3).completeness_error < 1e-5


def test_the_model_is_left_as_it_was(model):
    dp, before = DePass(model), model.model.forward
    dp.attribute(IDS, Tokens(), 3)
    assert model.model.forward == before and "forward" not in vars(model.model)
    assert not model.model._forward_pre_hooks
    own_forward = lambda *args, **kwargs: type(model.model).forward(model.model, *args, **kwargs)  # noqa: E731
    model.model.forward = own_forward  # as accelerate puts its own
    dp.attribute(IDS, Tokens(), 3)
    assert model.model.forward is own_forward


def test_other_threads_get_their_own_pass(model):
    """A pass of another thread goes through all layers while the decoder is replaced."""
    dp, found = DePass(model), []
    wanted = model(torch.tensor([IDS])).logits
    trace = dp.trace(IDS)

    def elsewhere(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: found.append(model(torch.tensor([IDS])).logits))
            thread.start()
            thread.join()

    model.lm_head.register_forward_pre_hook(elsewhere)
    own_logits(dp.adapter, trace.input_ids[-1:, None], trace.normed_final[-1:, None])
    assert torch.equal(found[0], wanted)


def test_many_places_are_read_in_parts(monkeypatch, model):
    dp = DePass(model)
    whole = dp.attribute([IDS, IDS[3:], IDS[1:6]], Tokens(), [None, 4, (None, 9), 9][:2])
    monkeypatch.setattr(own, "_LOGITS", 70)  # one place at a time
    parts = dp.attribute([IDS, IDS[3:], IDS[1:6]], Tokens(), [None, 4])
    for one, other in zip(whole, parts, strict=True):
        assert one.target_ids == other.target_ids and torch.equal(one.scores, other.scores)


SCALED = ["granite", "cohere", "gemma2: tight caps", "vaultgemma", "minicpm3", "nanochat", "hyperclovax", "internlm3"]
SCALED += ["opt: stream norms, projected embedding", "gptj", "bloom", "falcon: RW, ALiBi", "mpt", "gemma3: with vision"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", SCALED)
def test_known_scales_caps_and_biases_are_read(name, dtype):
    if name not in VARIANTS or not available(name):
        pytest.skip("this version of transformers does not have it")
    model = build_variant(name).to(dtype)
    dp = DePass(model)
    try:
        model(torch.tensor([IDS]))
    except RuntimeError as error:  # an older MPT's mask is beyond float32 in float64
        pytest.skip(str(error))
    result = dp.attribute([IDS, IDS[4:]], Heads(0), [None, 5])
    assert result[0].target_ids[1] == 5
