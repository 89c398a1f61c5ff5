"""One test-suite for all backends: the fast ones agree with the oracle whatever they are cut into."""

import pytest
import torch

from depass_fast import Custom, Heads, Neurons, Tokens
from depass_fast.allocation import NAMES
from depass_fast.linear_rules import LINEAR_RULES
from tests.support.components import kinds
from tests.support.models import FAMILIES, build, random_ids
from tests.support.states import close, corner_states
from tests.support.steps import start_state

ALL = ("reference", "torch", "triton")
SOME = ("llama-gqa", "mistral-window", "llama-biases")  # for kernels that are interpreted
EACH = [*(("torch", name) for name in FAMILIES), *(("triton", name) for name in SOME)]
# a rule knows nothing of the attention, of which these differ: all rules where there are biases, else one
RULED = [(*one, rule) for one in EACH for rule in NAMES if one[0] == "torch" or one[1] == SOME[-1] or rule == "softmax"]


@pytest.mark.parametrize(("backend", "name", "rule"), RULED)
def test_a_fast_backend_agrees_with_the_reference(backend, name, rule):
    dp, ids = build(name), random_ids(6 if backend == "triton" else 9, seed=5)
    trace = dp.trace(ids)
    for label, kind in kinds(len(ids)).items():
        if backend == "triton" and rule != "softmax" and label not in ("tokens@0", "neurons@0"):
            continue  # a rule knows nothing of other kinds
        oracle = dp.decompose(trace, kind, allocation=rule, backend="reference").dense()
        assert close(dp.decompose(trace, kind, allocation=rule, backend=backend).dense(), oracle), label


@pytest.mark.parametrize(("backend", "name"), [*(("torch", name) for name in SOME), *EACH[-3:]])
def test_results_do_not_depend_on_the_chunks(backend, name):
    dp, ids = build(name), random_ids(7 if backend == "triton" else 13, seed=6)
    trace = dp.trace(ids)
    for kind in (Tokens(), Tokens(1), Heads(0), Neurons(0)):
        oracle = dp.decompose(trace, kind, backend="reference").dense()
        for budget in (1, 2_000, 20_000, 200_000, 1 << 30) if backend == "torch" else (5_000, 1 << 30):
            found = dp.decompose(trace, kind, memory_budget=budget, backend=backend).dense()
            assert close(found, oracle), (kind, budget)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
def test_the_smallest_workspace_carries_a_component_and_a_position_at_a_time(name):
    dp, ids = build(name), random_ids(4, seed=6)
    trace = dp.trace(ids)
    for kind in (Tokens(), Heads(0)):
        oracle = dp.decompose(trace, kind, backend="reference").dense()
        assert close(dp.decompose(trace, kind, memory_budget=1, backend="triton").dense(), oracle), kind


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "qwen2"])
def test_a_batch_equals_the_prompts_one_by_one(name, backend):
    dp = build(name)
    prompts = [random_ids(n, seed=n) for n in ((4, 1, 6, 4) if backend == "triton" else (7, 1, 12, 7))]
    targets = [None, 3, (4, 5), [6, 7]]
    for kind in (Tokens(), Tokens(1), Heads(1), Neurons(0)):
        together = dp.attribute(prompts, kind, targets=targets, backend=backend)
        for prompt, target, batched in zip(prompts, targets, together, strict=True):
            alone = dp.attribute(prompt, kind, target, backend=backend)
            assert batched.labels == alone.labels and batched.target_ids == alone.target_ids
            assert torch.allclose(batched.scores, alone.scores, atol=1e-5 * float(alone.scores.abs().max()))
            assert torch.allclose(batched.target_logits, alone.target_logits, atol=1e-4)


@pytest.mark.parametrize(("backend", "name"), [("reference", name) for name in FAMILIES] + EACH[:-2])
def test_start_and_carry_are_decompose_in_steps(backend, name):
    family, ids = build(name), random_ids(4 if backend == "triton" else 8, seed=3)
    trace = family.trace(ids)
    for label, kind in kinds(len(ids)).items():
        state = family.start(trace, kind, backend=backend)
        for stop in [*range(state.layer + 1, family.adapter.n_layers + 1), None]:
            state = family.carry(trace, state, stop, backend=backend)
        assert close(state.dense(), family.decompose(trace, kind, backend=backend).dense()), label


@pytest.mark.parametrize("rule", LINEAR_RULES)
def test_a_state_may_be_changed_before_it_is_carried(rule):
    """Doubled states give doubled states where the rule is linear; every backend sees the change."""
    dp = build("llama-gqa")
    trace = dp.trace(random_ids(7))
    for kind in (Tokens(), Neurons(0)):
        for backend in ALL:
            state = dp.start(trace, kind)
            state.set_block(0, 2 * state.block(0))
            doubled = dp.carry(trace, state, allocation=rule, backend=backend).dense()
            assert close(doubled, 2 * dp.decompose(trace, kind, allocation=rule).dense())


@torch.no_grad()
def test_a_state_that_is_written_to_is_no_product_any_more():
    """Tokens and neurons start as numbers times vectors, which the first layer makes use of; not after a change."""
    dp = build("llama-gqa")
    trace = dp.trace(random_ids(7))
    for kind in (Tokens(), Neurons(0)):
        state = start_state(dp, trace, kind, allocation="taylor")
        assert state.factors is not None
        state.set_block(0, 2 * state.block(0))
        doubled = dp.carry(trace, state, allocation="taylor").dense()
        assert close(doubled, 2 * dp.decompose(trace, kind, allocation="taylor").dense())


def test_carry_refuses_what_does_not_fit():
    dp, ids = build("llama-gqa"), random_ids(7)
    trace = dp.trace(ids)
    with pytest.raises(TypeError, match=r"trace: expected dp.trace\(prompt\), got list"):
        dp.start(ids, Tokens())
    for kind, end, first in ((Tokens(1), 0, 1), (Heads(1), 1, 2), (Neurons(0), -1, 1), (Tokens(), 9, 0)):
        with pytest.raises(ValueError, match=f"end: {end} is out of range; these components reach layers {first} to 3"):
            dp.carry(trace, dp.start(trace, kind), end)
    with pytest.raises(ValueError, match="does not hold all positions"):
        dp.carry(dp.trace(ids[:5]), dp.start(trace, Tokens()))
    with pytest.raises(ValueError, match="made by another model"):
        dp.carry(build("qwen2").trace(ids), dp.start(trace, Tokens()))


def test_compute_and_state_dtypes_are_respected():
    dp, ids = build("llama-gqa"), random_ids(6)
    assert dp.decompose(ids, Tokens()).rows.dtype == torch.float32
    assert build("llama-gqa", torch.float64).decompose(ids, Tokens()).rows.dtype == torch.float64
    assert build("llama-gqa", torch.bfloat16).decompose(ids, Tokens()).rows.dtype == torch.float32
    oracle = dp.decompose(ids, Tokens(), state_dtype="float64", backend="reference").dense()
    half = dp.decompose(ids, Tokens(), state_dtype=torch.bfloat16)
    assert half.rows.dtype == torch.bfloat16 and close(half.dense().double(), oracle, 0.1)
    mixed = dp.decompose(ids, Tokens(), compute_dtype="bfloat16")
    assert mixed.rows.dtype == torch.float32 and close(mixed.dense().double(), oracle, 0.1)
    for rule in NAMES:  # as on a GPU: bfloat16 products, float32 state and statistics
        limit = 3e-2 if rule in LINEAR_RULES else 1e-2  # nothing normalises the shares of a linear rule
        assert (
            dp.attribute(ids, Tokens(), allocation=rule, method="exact", compute_dtype="bfloat16").layer_errors.max()
            < limit
        )
    assert not close(mixed.dense().double(), oracle, 1e-5)
    wide = dp.decompose(ids, Tokens(), compute_dtype="float64", state_dtype="float64").dense()
    assert close(wide, oracle, 1e-12)


# a rule knows nothing of the type, nor of what these models differ in
HALVES = [
    (name, dtype, rule)
    for name in ("llama-gqa", "mistral-window", "qwen2")
    for dtype in ("bfloat16", "float16")
    for rule in NAMES
]
ONCE = [("mistral-window", "bfloat16", "softmax"), ("qwen2", "float16", "softmax")]
AGAIN = [one for one in HALVES if one[:2] != ("qwen2", "bfloat16") and one not in ONCE]


@pytest.mark.parametrize(
    ("name", "dtype", "rule"),
    [one for one in HALVES if one not in AGAIN] + [pytest.param(*one, marks=pytest.mark.thorough) for one in AGAIN],
)
def test_half_precision_products_are_complete_and_near(name, dtype, rule):
    """A GPU's precision: products in half precision, state and statistics in float32; in one piece and in many."""
    dp, ids = build(name), random_ids(9, seed=5)
    trace = dp.trace(ids)
    for label, kind in kinds(len(ids)).items():
        oracle = dp.decompose(trace, kind, allocation=rule, backend="reference").dense()
        for backend, budget in (("torch", 20_000), ("torch", None), ("triton", None)):
            if backend == "triton" and label not in ("tokens@0", "heads@0", "neurons@0"):
                continue  # interpreted
            if backend == "triton" and rule != "softmax" and (name, dtype) != ("qwen2", "bfloat16"):
                continue  # a rule knows nothing of the attention, of which these differ, nor of the type
            if backend == "triton" and dtype == "float16" and label != "tokens@0":
                continue  # and the interpreter takes twice as long in it
            options = {"allocation": rule, "compute_dtype": dtype, "memory_budget": budget, "backend": backend}
            # nothing normalises the shares of a linear rule, so the rounding of gates and ups is in their sum
            limit = 3e-2 if rule in LINEAR_RULES else 1e-2
            assert dp.attribute(trace, kind, method="exact", **options).layer_errors.max() < limit, (
                label,
                backend,
                budget,
            )
            if (
                rule == "softmax" or rule in LINEAR_RULES
            ):  # the others jump: at a tie, or where the smallest gate changes
                assert close(dp.decompose(trace, kind, **options).dense(), oracle, 0.1), (label, backend, budget)


# -- the corners of the allocation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases"])
def test_zero_components_stay_zero_and_the_sum_exact(name, rule):
    for backend, dtype, same, exact in (
        ("torch", torch.float64, 1e-10, 1e-12),
        ("triton", torch.float32, 1e-5, 2e-6),
    ):
        dp, ids = build(name, dtype), random_ids(8)
        trace = dp.trace(ids)
        kind = Custom(1, corner_states(trace).to(dtype))
        oracle = dp.decompose(trace, kind, allocation=rule, backend="reference").dense()
        out = dp.decompose(trace, kind, allocation=rule, backend=backend).dense()
        assert close(out, oracle, same), backend
        assert not out[:, 4].any()
        assert close(out.sum(1), trace.normed_final, exact), backend


@pytest.mark.parametrize("backend", ALL)
def test_where_nobody_is_eligible_rest_takes_all_else_those_alive(backend):
    """With every token excluded nobody may take part away from home: the shares are split among those alive."""
    dtype, exact = (torch.float32, 1e-6) if backend == "triton" else (torch.float64, 1e-12)
    dp, ids = build("llama-gqa", dtype), random_ids(5)
    trace = dp.trace(ids)
    everyone = list(range(5))
    for rule in ("softmax", "linear", "relu", "max"):
        state = dp.decompose(trace, Tokens(), end=1, exclude_special=everyone, allocation=rule, backend=backend)
        assert close(state.dense().sum(1), trace.resid(1), exact), rule
