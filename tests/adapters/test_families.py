"""Every supported family and variant, in the installed transformers: the model's own numbers, and all of them.

``pytest tests/adapters/test_families.py --family-results FILE.json`` writes the measured errors to a file. The table in
docs/families.md is made of such files (``python -m bench.studies.families``).
"""

from __future__ import annotations

import copy
import functools
from dataclasses import is_dataclass

import numpy as np
import pytest
import torch
import transformers

from bench.studies.families import NARROW_INSIDE
from depass_fast import Custom, DePass, Heads, Modules, Neurons, Tokens
from depass_fast.backends import backend_status
from depass_fast.trace.recorder import Recorder
from tests.support.added import added_by
from tests.support.components import is_there, kinds
from tests.support.family_models import VARIANTS, available, build_variant
from tests.support.models import random_ids
from tests.support.recurrent_models import RECURRENT

LENGTHS = (9, 1, 6)
PROMPTS = [torch.tensor(random_ids(n, seed=n)) for n in LENGTHS]
NEW = int(transformers.__version__.split(".")[0]) >= 5
EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}
SLIGHT = 5  # rounding in units of the dtype's epsilon: a half-precision model's own, of every sum in three layers

_AGAIN = ("tokens@0", "heads@0", "mlp@last", "neurons@0", "features@1")  # with another seed and little memory
_AFTER_THE_NEURONS = (
    *(
        f"{name}.bias"
        for name in ("down_proj", "proj_down", "mlp.c_proj", "dense_4h_to_h", "fc_out", "fc2", "1.final_layer_norm")
    ),
    "down_proj_bias",
    "mlp.bias",
    *(f"post_mlp_residual_scale.{name}_bias" for name in ("hidden_states", "residual")),
)

pytestmark = pytest.mark.parametrize("name", VARIANTS)
once_a_family, once_a_file, thorough = pytest.mark.once_a_family, pytest.mark.once_a_file, pytest.mark.thorough


def able(backend, dtype):
    """A backend that runs on a CPU and computes in a dtype."""
    return backend_status(torch.device("cpu"), dtype).get(backend, "") is None


def exact(name, dtype):
    """The largest error that is allowed, relative to what there is."""
    return max(EXACT[dtype], 1e-6 if VARIANTS[name][0] in NARROW_INSIDE else 0.0)


def once(make):
    """The last result is kept, no other: a variant's tests run one after another (see conftest.py)."""
    cached = functools.lru_cache(maxsize=8)(make)
    return lambda name, dtype=torch.float32, seed=0, batch=False: cached(name, dtype, seed, batch)


@once
def built(name: str, dtype: torch.dtype, seed: int, batch: bool) -> DePass:
    if not available(name):
        pytest.skip(f"the installed transformers does not have {VARIANTS[name][0]}")
    return DePass(build_variant(name, seed, regroup=seed == 1).to(dtype))  # with and without GQA


@once
def traced(name: str, dtype: torch.dtype, seed: int, batch: bool):
    dp = built(name, dtype, seed)
    try:
        return dp.trace(PROMPTS if batch else PROMPTS[0])
    except RuntimeError as error:
        with torch.no_grad():
            try:
                dp.model(PROMPTS[0][None])
            except RuntimeError as own:  # the model itself does not run either
                pytest.skip(f"transformers itself: {own}")
        raise error


def targets(dp: DePass, trace) -> list:
    """None, an id and a pair whose logits are not near zero: a sum near zero would be all rounding."""
    order = dp.adapter.logits(trace.normed_final[-1]).argsort().tolist()
    return [None, order[0], (order[-2], order[1])]


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
@pytest.mark.parametrize(("implementation", "seed"), [("sdpa", 1), pytest.param("eager", 0, marks=once_a_file)])
def test_captured_logits_are_the_models_own(name, implementation, seed, family_results):
    """Logits of packed prompts agree, and what was recorded does not change when the model runs again."""
    if not available(name):
        pytest.skip(f"the installed transformers does not have {VARIANTS[name][0]}")
    try:
        model = build_variant(name, seed, implementation, regroup=seed == 1)
    except ValueError as error:
        pytest.skip(f"transformers itself: {error}")
    dp, recorded, keep = DePass(model), [], Recorder.keep

    def watched(recorder, record, what, x):
        recorded.append((x, x.clone()))
        keep(recorder, record, what, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "keep", watched)
        trace = dp.trace(PROMPTS)
    assert recorded and all(torch.equal(x, copy) for x, copy in recorded)
    for p, ids in enumerate(PROMPTS):
        captured = dp.adapter.logits(trace.normed_final[trace.span(p)])
        error = largest_difference(captured, model(ids[None]).logits[0])
        family_results(name, "logits", error)
        assert error <= (1e-5 if name not in RECURRENT else max(1e-5, 2 * rounding(model, ids)))


def rounding(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """The rounding of a model's own logits: a recurrence sums up what a softmax would average."""
    wide = DePass(copy.deepcopy(model).double())
    exact = wide.adapter.logits(wide.trace(ids).normed_final)
    return largest_difference(model(ids[None]).logits[0].double(), exact)


@pytest.mark.parametrize(
    ("dtype", "seed"),
    [
        (torch.float32, 0),
        pytest.param(torch.float32, 1, marks=once_a_file),
        pytest.param(torch.float64, 2, marks=once_a_family),
    ],
    ids=["float32", "little", "float64"],
)
def test_every_kind_is_complete_and_all_backends_agree(name, dtype, seed, family_results, pytestconfig):
    dp, trace = built(name, dtype, seed), traced(name, dtype, seed)
    wanted, every = targets(dp, trace), kinds(LENGTHS[0], dp.adapter.stream_width, dp.adapter.width_at("resid_mid"))
    every = {label: kind for label, kind in every.items() if is_there(dp, kind)}
    shares = torch.rand(LENGTHS[0], 4, 1, generator=torch.Generator().manual_seed(seed)).to(dtype) / 3
    every["custom@1"] = Custom(1, shares * trace.resid(1)[:, None])  # of the size of what there is to be split
    for label, kind in every.items():
        if label not in _AGAIN and (seed == 1 or (seed == 2 and not pytestconfig.getoption("thorough"))):
            continue
        if isinstance(kind, Custom) and kind.site == "resid_mid" and dp.adapter.is_parallel:
            with pytest.raises(ValueError, match="there is no 'resid_mid' between them"):
                dp.attribute(PROMPTS[0], kind)
            continue
        oracle = dp.attribute(trace, kind, wanted, backend="reference")
        result = dp.attribute(trace, kind, wanted, backend="torch", **({} if seed == 0 else {"memory_budget": 3000}))
        agree(name, dtype, result, oracle, family_results, label)
        family_results(name, "kinds", kind.kind)


def agree(name, dtype, result, oracle, family_results, label=""):
    """Both are complete, and one is the other."""
    for one in (result, oracle):
        error = float(one.layer_errors.max().clamp_min(one.completeness_error))  # max() would pass over NaN
        family_results(name, f"completeness {str(dtype)[6:]}", error)
        assert error <= exact(name, dtype), label
    apart = largest_difference(result.scores, oracle.scores)
    family_results(name, f"agreement {str(dtype)[6:]}", apart)
    assert apart <= exact(name, dtype), label
    assert result.labels == oracle.labels


@once_a_file
@pytest.mark.skipif(not NEW, reason="kernels know nothing of transformers: once is enough")
@pytest.mark.skipif(not able("triton", torch.float32), reason="Triton is not installed")
def test_the_kernels_agree(name, family_results):
    """They are interpreted, which takes long: tokens of a short prompt."""
    dp = built(name)
    trace = dp.trace(PROMPTS[0][:4])
    oracle, result = (dp.attribute(trace, Tokens(), targets(dp, trace), backend=one) for one in ("reference", "triton"))
    agree(name, torch.float32, result, oracle, family_results)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=once_a_file), torch.float64], ids=["float32", "float64"]
)
def test_a_linear_rule_is_complete_and_the_backends_agree(name, dtype):
    """Every other variant under the one rule, the others under the other."""
    dp, trace = built(name, dtype), traced(name, dtype)
    rule = ("half", "shapley")[list(VARIANTS).index(name) % 2]
    oracle = dp.attribute(trace, Tokens(), targets(dp, trace), allocation=rule, method="exact", backend="reference")
    result = dp.attribute(trace, Tokens(), targets(dp, trace), allocation=rule, method="exact", backend="torch")
    for one in (oracle, result):
        assert float(one.layer_errors.max().clamp_min(one.completeness_error)) <= exact(name, dtype)
    assert largest_difference(result.scores, oracle.scores) <= exact(name, dtype) and result.labels == oracle.labels


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.bfloat16, marks=once_a_file), pytest.param(torch.float16, marks=thorough)],
    ids=["bfloat16", "float16"],
)
def test_half_precision_is_complete_up_to_the_models_own_rounding(name, dtype):
    dp, trace = built(name, dtype), traced(name, dtype)
    for kind in (kind for kind in (Tokens(), Heads(0), Neurons(1)) if is_there(dp, kind)):
        result = dp.attribute(trace, kind)
        assert result.scores.dtype == torch.float32
        limit = SLIGHT * torch.finfo(dtype).eps
        assert result.completeness_error <= limit and result.layer_errors.max() <= limit


@once_a_file
def test_a_batch_equals_the_prompts_one_by_one(name):
    """Compared in float64: packing changes the rounding, and a softmax at T = 0.1 can enlarge it a hundredfold."""
    dp, together = built(name, torch.float64, 2), traced(name, torch.float64, 2, batch=True)
    for backend in ("torch", "reference"):
        every = (Tokens(), Heads(1), Neurons(0)) if backend == "torch" else (Tokens(),)
        for kind in (kind for kind in every if is_there(dp, kind)):
            for ids, batched in list(zip(PROMPTS, dp.attribute(together, kind, 5, backend=backend), strict=True))[1:]:
                alone = dp.attribute(ids, kind, 5, backend=backend)
                assert batched.labels == alone.labels
                assert largest_difference(batched.scores, alone.scores) <= 1e-9


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=once_a_file)])
def test_padded_prompts_are_traced_as_without(name, side):
    """The traces agree to the last bit, so components of every kind agree, too."""
    dp, expected = built(name), traced(name, batch=True)
    rows = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(rows)
    for row, real, ids in zip(rows, mask, PROMPTS, strict=True):
        at = slice(len(row) - len(ids), None) if side == "left" else slice(len(ids))
        row[at], real[at] = ids, 1
    trace = dp.trace({"input_ids": rows, "attention_mask": mask})
    assert trace.batch and np.array_equal(trace.offsets, expected.offsets)
    pairs = list(zip(tensors(trace), tensors(expected), strict=True))
    assert len(pairs) > 3 * 8 and all(torch.equal(ours, theirs) for ours, theirs in pairs)


def tensors(part) -> list[torch.Tensor]:
    """All that a trace, or a part of it, holds."""
    if isinstance(part, torch.Tensor):
        return [part]
    inner = part if isinstance(part, tuple | list) else vars(part).values() if is_dataclass(part) else ()
    return [x for value in inner for x in tensors(value)]


@once_a_file
def test_any_position_any_layer_and_in_steps(name):
    """The pruned readout equals the full state, also at the input of a layer, also when carried layer by layer."""
    dp, trace = built(name), traced(name)
    wide = torch.randn(dp.adapter.stream_width, generator=torch.Generator().manual_seed(0))
    for kind in (Tokens(), Neurons(0)):
        if not is_there(dp, kind):
            continue
        state = dp.start(trace, kind)
        for end in (2, None):
            state = dp.carry(trace, state, end)
            full = dp.decompose(trace, kind, end=end)
            whole, labels = full.dense(), full.labels
            carried = state.dense()  # with a bias already, where only later layers have one
            assert all(label in labels or label == "bias" for label in state.labels)
            assert not carried[:, [i for i, label in enumerate(state.labels) if label not in labels]].any()
            assert largest_difference(carried[:, [state.labels.index(label) for label in labels]], whole) <= 1e-5
            direction = wide if end is not None else wide[: dp.adapter.hidden_size]
            for position in (0, 4):
                result = dp.attribute(trace, kind, direction, position=position, end=end)
                wanted = dict(zip(labels, (whole[position] @ direction).tolist(), strict=True))
                found = dict(zip(result.labels, result.scores.tolist(), strict=True))
                for label, score in wanted.items():  # experts' neurons that are reached later are no components yet
                    assert abs(found.get(label, 0.0) - score) <= 1e-5 * float(whole.abs().max())


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "seed"),
    [pytest.param(torch.float32, 0, marks=once_a_file), (torch.float64, 2)],
    ids=["float32", "float64"],
)
def test_activations_follow_from_gate_and_up_projection(name, dtype, seed):
    """The up projection of what is read, its bias, the activation function and a router's weight give them."""
    dp, trace = built(name, dtype, seed), traced(name, dtype, seed)
    dp.adapter.check_linear_rule("half")
    for index, layer in enumerate(trace.layers):
        mlps = dp.adapter.mlps(index)
        for part in layer.mlps:
            mlp, up = mlps[part.part], None
            if mlp.up is not None:
                resid = part.resid if part.positions is None else part.resid[part.positions]
                weight = 1.0 if part.input_weight is None else part.input_weight[:, None]
                up = resid * mlp.scale(resid).view(len(resid), -1) * weight @ mlp.reading(mlp.w_up, dtype).T
                constant = mlp.up_constant(dtype)
                up = up if constant is None else up + constant
            act = mlp.activation(part.gate, up)
            assert (part.router_weight is None) == (mlp.name == "" or mlp.follows)
            assert mlp.follows == (part.factor is not None)
            factors = part.behind(mlp, slice(None), act.dtype)
            act = act if factors is None else act * factors
            assert largest_difference(act, part.act) <= exact(name, dtype), (index, mlp.name)


@torch.no_grad()
def test_heads_and_neurons_are_what_the_model_adds(name):
    """Heads and neurons with their constants sum to what an ordinary forward pass adds to the residual stream."""
    dp, trace = built(name), traced(name)
    for layer in (0, 1):
        both, added = {"attention": Heads(layer), "mlp": Neurons(layer)}, added_by(dp, PROMPTS[0], layer)
        for part, kind in ((part, kind) for part, kind in both.items() if is_there(dp, kind)):
            state = dp.start(trace, kind)
            named = [i for i, label in enumerate(state.labels) if label != "rest"]
            assert largest_difference(state.dense()[:, named].sum(1), added[part]) <= 2e-5, (part, layer)


def test_labels_and_where_there_is_a_bias(name):
    dp, trace = built(name), traced(name)
    adapter = dp.adapter
    kind = adapter.kind(1)
    own_widths = kind.mixer is not None or kind.head_experts is not None or adapter.family.kinds is not None
    own_widths = own_widths and adapter.has_attention(1)
    heads = adapter.attention(1).n_heads if own_widths else adapter.config.num_attention_heads
    if not (adapter.has_attention(1) and adapter.has_mlp(0)):
        return
    assert dp.start(trace, Heads(1)).labels[:heads] == [f"L1H{h}" for h in range(heads)]
    labels = dp.start(trace, Neurons(0)).labels
    if adapter.is_mixture(0):
        mlp = trace.layers[0].mlps
        names = [f"E{part.part}" for part in mlp if part.positions is not None]
        whole = [dp.adapter.mlps(0)[part.part].name for part in mlp if part.positions is None]
        assert whole in ([], ["shared"], ["shared", "embed"])
        names += whole
        assert list(dict.fromkeys(label.split("N")[0] for label in labels)) == [
            *(f"L0{expert}" for expert in names),
            *(label for label in labels if label in ("rest", "bias")),
        ]
    else:
        assert labels[5] == "L0N5"
    biases = {path for path, _ in dp.model.named_parameters() if path.endswith("bias")}
    biases = {path for path in biases if not any(part in path for part in ("vision", "audio", "multi_modal"))}
    only_looked_at = ("q_proj", "k_proj", "q_layernorm", "k_layernorm", "embed")  # Q's and K's end in the probabilities
    only_looked_at += ("router", "correction_bias", "expert_bias", "gate_bias")  # frozen
    only_looked_at += ("indexer", "position_bias")  # and of what selects keys, or weighs values in an entry
    only_looked_at += ("dt_bias", "dt_proj", "igate_preact", "fgate_preact")  # a recurrence's in its decay, or writes
    constants = {path for path in biases if not any(part in path for part in only_looked_at)}
    last = f".{adapter.n_layers - 1}."
    in_layers = {path for path in constants if any(f".{layer}." in path for layer in range(adapter.n_layers))}
    at_the_end = constants - in_layers
    written_last = {path for path in in_layers if last in path and path.endswith(_AFTER_THE_NEURONS)}
    assert "rest" not in dp.attribute(trace, Tokens()).labels
    assert ("bias" in dp.attribute(trace, Tokens()).labels) == bool(constants)
    if is_there(dp, Neurons(-1)):
        assert ("bias" in dp.attribute(trace, Neurons(-1)).labels) == bool(at_the_end | written_last)
    assert "rest" in dp.attribute(trace, Modules(0)).labels
