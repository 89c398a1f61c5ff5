"""Plans of models with recurrences: what is held in their forward passes and on their ways back, and time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from depass_fast import DePass, Tokens
from depass_fast.adapters.recurrent import knows_recurrences
from depass_fast.backends.torch import cost
from depass_fast.planning.planner import make_plan
from depass_fast.planning.recurrences import mixer_sizes
from depass_fast.planning.shapes import ForwardPass, RunShape, layer_sizes
from depass_fast.trace import mixing, scan
from depass_fast.trace.recorder import Recorder
from depass_fast.trace.size import layer_bytes
from tests.support.family_models import VARIANTS, build_model
from tests.support.models import build, random_ids

pytestmark = pytest.mark.skipif(not knows_recurrences(), reason="the installed transformers is too old")

LONG = 520  # positions, of which no matrix is made
WIDER = {
    "kimi_linear": {"linear_head_dim": 32, "linear_num_heads": 8},
    "mamba": {"expand": 8, "state_size": 16},
}


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest storage that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [x.numel() * x.element_size() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.most = max(self.most, *(sizes if not func.is_view else []), 0)
        return made


def model(name: str) -> DePass:
    model_type, changes = VARIANTS[name]
    return DePass(build_model(model_type, **{**changes, **WIDER.get(name, {}), "max_position_embeddings": LONG}))


@pytest.mark.parametrize("name", ["kimi_linear", pytest.param("mamba", marks=pytest.mark.thorough)])
def test_the_forward_pass_holds_a_recurrences_largest_numbers_three_times(name):
    """Decays of all pairs in all chunks, and states of all positions, in the model's own code."""
    dp = model(name)
    with Largest() as made:
        dp.trace(random_ids(LONG))
    planned = ForwardPass.of(dp.adapter, [LONG], False, torch.device("cpu"))
    mixer = mixer_sizes(dp.adapter)[0]
    assert mixer is not None
    held = 4 * mixer.numbers * -(-LONG // mixer.chunk) * mixer.chunk  # whole chunks
    assert 3 <= held / made.most < 4 and planned.peak - planned.trace >= held


def storages(x: Any) -> dict[int, int]:
    """The bytes of every storage that is held somewhere in records."""
    if isinstance(x, torch.Tensor):
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return {place: size for part in parts for place, size in storages(part).items()}


def test_streams_that_are_copied_when_the_pass_is_over_are_no_part_of_it(monkeypatch):
    dp, recorded, end = model("zamba2"), [], Recorder.trace
    spy = lambda self, *given: recorded.append(sum(storages([self.layers]).values())) or end(self, *given)  # noqa: E731
    monkeypatch.setattr(Recorder, "trace", spy)
    trace = dp.trace(random_ids(100))
    streams = [dp.adapter.kind(index).streams for index in range(dp.adapter.n_layers)]
    copied = 4 * 100 * dp.adapter.hidden_size * sum(one.gathered_streams for one in streams if one is not None)
    assert 0.5 < copied / (trace.nbytes - recorded[0]) <= 1
    planned = ForwardPass.of(dp.adapter, [100], False, torch.device("cpu"))
    monkeypatch.setattr(type(streams[0]), "gathered_streams", 0)
    assert ForwardPass.of(dp.adapter, [100], False, torch.device("cpu")).peak - planned.peak == copied


def test_later_layers_are_not_recorded_while_an_earlier_one_holds_most():
    first = {"layers_block_type": ["linear_attention", "mlp", "mlp"], "num_hidden_layers": 3}
    last = {**first, "layers_block_type": ["mlp", "mlp", "linear_attention"]}
    adapters = [DePass(build_model("nemotron_h", **blocks)).adapter for blocks in (first, last)]
    early, late = (ForwardPass.of(adapter, [100], False, torch.device("cpu")) for adapter in adapters)
    of_mlp = layer_bytes(adapters[0], torch.float32)[2]
    assert early.trace == late.trace and late.peak - early.peak == 100 * 2 * of_mlp


@pytest.mark.parametrize("name", ["kimi_linear", "xlstm"])
def test_prompts_that_go_together_hold_what_a_long_one_holds(name):
    """The longest alone, in models that take one after the other."""
    adapter, cpu = model(name).adapter, torch.device("cpu")
    few, together, one = (ForwardPass.of(adapter, n, False, cpu) for n in ([64], [64] * 8, [64 * 8]))
    beside = together.peak - together.trace
    assert together.trace == one.trace and adapter.one_by_one == (name == "xlstm")
    wanted = few.peak - few.trace + 7 * 64 * adapter.hidden_size * 4 if adapter.one_by_one else one.peak - one.trace
    assert beside == pytest.approx(wanted, rel=0.05)


def test_probabilities_in_the_place_of_a_recurrence_are_planned():
    """A head of DiffLlama has two softmaxes."""
    sizes = {name: mixer_sizes(model(name).adapter)[0] for name in ("diffllama", "zaya")}
    for name, size in sizes.items():
        assert size is not None and size.differ == (name == "diffllama")
        assert size.mixed(300, True) - size.scanned(True) == (6 if size.differ else 3) * size.looking * 300**2 > 0


def test_a_way_back_makes_no_more_than_some_heads_numbers(monkeypatch):
    """However many heads and positions there are; a softmax beside a recurrence makes a tile after the other."""
    dp, most = model("falcon_h1"), 1 << 14
    for place, name in ((scan, "SCANNED"), (mixing, "LOOKED")):
        monkeypatch.setattr(place, name, most)
    trace = dp.trace(random_ids(LONG))
    weights, record = dp.adapter.attention(0), trace.layers[0].attention
    mixed = mixing.FrozenMixing(weights, record, slice(0, LONG), torch.float32)
    y = torch.randn(LONG, 1, weights.n_heads * weights.head_dim)
    with torch.no_grad(), Largest() as made:
        mixed.back(y)
    assert made.most <= 4 * max(2 * most, y.numel())


def test_matrices_that_are_not_made_are_not_planned(monkeypatch):
    """No matrix is made of many heads, however short the prompt is."""
    dp = model("recurrent_gemma")
    heads = dp.adapter.attention(0).n_heads

    def peak() -> int:
        return make_plan(RunShape(dp.adapter, [200], Tokens())).of("torch").peak_bytes

    with_matrices = peak()
    for place in (cost, mixing):
        monkeypatch.setattr(place, "MATRIX", heads * 200**2 - 1)
    assert with_matrices - peak() > 4 * heads * 200**2


def test_recurrences_have_sizes():
    sizes = {name: mixer_sizes(model(name).adapter) for name in ("falcon_h1", "kimi_linear", "inkling_text")}
    assert [bool(size and size.looking) for size in sizes["falcon_h1"]] == [True] * 3
    assert [size is None for size in sizes["kimi_linear"]] == [False, True, False]
    assert all(size is not None and not size.heads for size in sizes["inkling_text"])


def test_seconds_of_recurrences_are_a_lower_bound():
    for dp, bound in ((model("kimi_linear"), "at least"), (build("llama-gqa"), "about")):
        plan = make_plan(RunShape(dp.adapter, [9], Tokens()), gemm_flops=1e9)
        assert f", {bound} " in str(plan) and plan.seconds_at_least == (bound == "at least")


@pytest.mark.parametrize("name", ["inkling_text", "kimi_linear", "falcon_h1"])
def test_what_a_forward_pass_records_beyond_the_trace_is_planned(name, monkeypatch):
    """Convolutions behind branches and experts have all positions recorded of what they read."""
    dp, trace, seen = model(name), Recorder.trace, []
    monkeypatch.setattr(Recorder, "trace", lambda recorder, *given: seen.append(recorder) or trace(recorder, *given))
    dp.trace(random_ids(20))
    for size, record in zip(layer_sizes(dp.adapter), seen[0].layers, strict=True):
        beyond = [record[key] for key in ("attention_given", "mlp_given", "experts_input") if key in record]
        assert sum(x.numel() for x in beyond) == size.recorded * 20 * dp.adapter.hidden_size
