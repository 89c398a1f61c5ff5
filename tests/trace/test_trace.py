"""The trace is the model's own forward pass, and the model is handed back as it came."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from depass_fast import DePass, Tokens
from depass_fast.trace import attention, finite
from tests.support.family_models import build_model
from tests.support.models import FAMILIES, build, random_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_prompts_give_the_models_own_logits(name):
    dp = build(name)
    prompts = [torch.tensor(random_ids(n, seed=n)) for n in (11, 1, 6)]
    trace = dp.trace(prompts)
    for p, ids in enumerate(prompts):
        own = dp.model(ids[None]).logits[0]
        captured = dp.adapter.unembedding(trace.normed_final[trace.span(p)])
        assert torch.allclose(captured, own, atol=1e-5), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("changes", [{"max_window_layers": 1}, {"max_window_layers": 0}, {"use_sliding_window": False}])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen2_moe"])
def test_windows_are_those_of_the_models_own_mask(model_type, changes, implementation):
    window = {"use_sliding_window": True, "sliding_window": 4, "num_key_value_heads": 2, **changes}
    model = build_model(model_type, **window)
    model.config._attn_implementation = implementation
    ids = torch.tensor(random_ids(12))
    own = model(ids[None]).logits[0]
    trace = DePass(model).trace(ids)
    assert torch.allclose(model.lm_head(trace.normed_final), own, atol=1e-5)


@pytest.mark.parametrize(
    ("tile", "calls"),
    [
        (attention.TILE[True], [(5, 6), (1, 3), (1, 6)]),
        (2 * 4 * 6**2, [(2, 6), (2, 6), (1, 6), (1, 3), (1, 6)]),
        (1, [(1, 6)] * 5 + [(1, 3), (1, 6)]),
    ],
)
def test_neighbours_of_equal_length_are_attended_together_while_their_logits_are_few(tile, calls, monkeypatch):
    prompts = [random_ids(n, seed=seed) for seed, n in enumerate((6, 6, 6, 6, 6, 3, 6))]
    dp, seen = build("llama-gqa"), []  # of 4 heads
    alone = [dp.trace(ids) for ids in prompts]

    ordinary = attention.causal_attention

    def attend(q, *given, **named):
        seen.append((len(q), q.shape[2]))
        return ordinary(q, *given, **named)

    monkeypatch.setattr(attention, "causal_attention", attend)
    monkeypatch.setattr(attention, "TILE", {True: tile})
    trace = dp.trace(prompts)
    assert seen == calls * dp.adapter.n_layers
    for prompt, one in enumerate(alone):
        assert torch.allclose(trace.normed_final[trace.span(prompt)], one.normed_final, atol=1e-5)
        for layer, own in zip(trace.layers, one.layers, strict=True):
            for x, y in zip(layer.tensors(), own.tensors(), strict=True):
                assert torch.allclose(x[trace.span(prompt)], y, atol=1e-5)


@pytest.mark.parametrize("window", [3, 300])
def test_windows_in_tiles_are_those_of_a_whole_mask(window):
    n, generator = 700, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, generator=generator) for heads in (4, 2, 2))
    wide, wide_v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    distance = torch.arange(n)[:, None] - torch.arange(n)
    logits = (0.3 * q @ wide.transpose(-1, -2)).masked_fill((distance < 0) | (distance >= window), -torch.inf)
    found, _ = attention.causal_attention(q, k, v, scale=0.3, window=window, softcap=None)
    assert torch.allclose(found, logits.softmax(-1) @ wide_v, atol=1e-5)


def test_memory_grows_with_the_length_not_its_square():
    dp = build("llama-gqa")
    sizes = {n: dp.trace(random_ids(n)).nbytes for n in (8, 16, 32)}
    assert sizes[32] - sizes[16] == 2 * (sizes[16] - sizes[8])


def snapshot(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    return hooks, weights, modes, model.config._attn_implementation, [p.requires_grad for p in model.parameters()]


def same(a, b):
    return a[0] == b[0] and all(torch.equal(a[1][n], b[1][n]) for n in a[1]) and a[2:] == b[2:]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_handed_back_as_it_came(error, monkeypatch):
    model = build_model("llama", num_key_value_heads=2)
    before, grad = snapshot(model), torch.is_grad_enabled()
    dp = DePass(model)
    if error is None:
        dp.attribute(random_ids(5), Tokens())
    else:

        def fail(*args, **kwargs):
            raise error("in the middle of layer 1")

        monkeypatch.setattr(model.model.layers[1].mlp, "forward", fail)
        with pytest.raises(error, match="in the middle of layer 1"):
            dp.attribute(random_ids(5), Tokens())
        monkeypatch.undo()
    assert same(before, snapshot(model))
    assert torch.is_grad_enabled() == grad
    out = model(torch.tensor([random_ids(5)])).logits
    assert torch.equal(out, build_model("llama", num_key_value_heads=2)(torch.tensor([random_ids(5)])).logits)


def test_a_second_model_can_be_traced_inside_a_hook_of_the_first():
    """The recorder is a stack: nested captures do not mix."""
    outer, inner = build("llama-mha"), build("qwen2")
    inner_alone = inner.trace(random_ids(4)).normed_final
    seen = []
    handle = outer.model.model.layers[0].register_forward_hook(
        lambda *_: seen.append(inner.trace(random_ids(4)).normed_final)
    )
    try:
        nested = outer.trace(random_ids(6)).normed_final
    finally:
        handle.remove()
    assert torch.equal(seen[0], inner_alone)
    assert torch.equal(nested, outer.trace(random_ids(6)).normed_final)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_name_the_layer_and_the_module(value):
    model = build_model("llama", num_key_value_heads=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(FloatingPointError, match=r"layer 1: the weights of model\.layers\.1\.mlp\.up_proj"):
        DePass(model).attribute(random_ids(5), Tokens())


def test_overflowing_activations_name_the_layer():
    model = build_model("llama", num_key_value_heads=2)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(5e4)
    with pytest.raises(FloatingPointError, match="layer 2: its activations"):
        DePass(model.half()).attribute(random_ids(5), Tokens())


def test_bad_embedding_is_named():
    model = build_model("llama", num_key_value_heads=2)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(FloatingPointError, match="embedding"):
        DePass(model).trace([1, 7])


@pytest.mark.parametrize("part", ["q_proj", "k_proj"])
def test_bad_queries_and_keys_are_named(part):
    """Attention turns NaN queries into finite outputs: the residual stream alone would not show them."""
    model = build_model("llama", num_key_value_heads=2)
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, part).weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=rf"layer 1: the weights of model\.layers\.1\.self_attn\.{part}"):
        DePass(model).attribute(random_ids(5), Tokens())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gpu_finds_one_bad_element_in_a_sum(dtype, bad):
    """It sums all recorded tensors at once, in float32 or wider: their largest numbers together are no infinity."""
    large, turned = torch.full((70, 1000), 6e4).to(dtype), torch.ones(2, 3, 4, dtype=dtype).transpose(0, 1)
    tensors = [torch.ones(4, 3), large, turned]
    assert finite._has_finite_sums(*tensors)
    for tensor in tensors:
        tensor[1, 1] = bad
        assert not finite._has_finite_sums(*tensors)
        tensor[1, 1] = 1.0


def test_threads_do_not_mix():
    model = build_model("llama", num_key_value_heads=2)
    implementation, dp = model.config._attn_implementation, DePass(model)
    prompts = [random_ids(6, seed=seed) for seed in range(4)]
    expected = [dp.attribute(ids, Tokens()).scores for ids in prompts]

    def work(index: int) -> bool:
        return all(torch.equal(dp.attribute(prompts[index], Tokens()).scores, expected[index]) for _ in range(15))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert model.config._attn_implementation == implementation
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("place", ["model.layers.0.mlp", "model"])
def test_a_forward_pass_of_another_thread_is_told_to_wait(place):
    """It is refused while the model is traced. Beside the ordinary pass that follows it runs, and is not recorded."""
    model = build_model("llama", num_key_value_heads=2)
    seen, here = [], threading.current_thread()

    def elsewhere() -> None:
        try:
            model(torch.tensor([random_ids(3, seed=1)]))
            seen.append("ran")
        except RuntimeError as error:
            seen.append(str(error))

    def during(*_) -> None:
        if threading.current_thread() is here:  # not again from that other thread, and so on
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()

    handle = model.get_submodule(place).register_forward_hook(during)
    alone = DePass(build_model("llama", num_key_value_heads=2)).trace(random_ids(6))
    try:
        trace = DePass(model).trace(random_ids(6))
    finally:
        handle.remove()
    assert "being traced by depass_fast in another thread" in seen[0]
    assert seen[1:] == ["ran"]
    assert torch.equal(trace.normed_final, alone.normed_final)
