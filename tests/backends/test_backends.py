"""One test-suite for all backends: the fast ones agree with the oracle whatever they are cut into."""

import pytest
import torch

from depass_fast import Custom, Heads, Neurons, Tokens
from depass_fast.allocation import RULES, Gates
from depass_fast.runtime.transfer import to_device
from tests.support.components import kinds
from tests.support.models import FAMILIES, build, random_ids
from tests.support.states import close, corner_states
from tests.support.steps import carried, start_state

ALL = ("reference", "torch", "triton")
SOME = ("llama-gqa", "mistral-window", "llama-biases")  # for kernels that are interpreted
EACH = [*(("torch", name) for name in FAMILIES), *(("triton", name) for name in SOME)]
# a rule knows nothing of the attention, of which these differ: all rules where there are biases, else one
RULED = [(*one, rule) for one in EACH for rule in RULES if one[0] == "torch" or one[1] == SOME[-1] or rule == "softmax"]


@pytest.mark.parametrize(("backend", "name", "rule"), RULED)
def test_a_fast_backend_agrees_with_the_reference(backend, name, rule):
    dp, ids = build(name), random_ids(6 if backend == "triton" else 9, seed=5)
    trace = dp.trace(ids)
    for label, kind in kinds(len(ids)).items():
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


@pytest.mark.parametrize("position", [-1, 0, 4])
def test_the_pruned_readout_equals_the_full_state(family, position):
    """attribute computes the last layer at one position only; decompose computes all of it."""
    ids = random_ids(8, seed=2)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    for kind in (Tokens(), Heads(-1), Neurons(-1), Neurons(0)):
        result = family.attribute(ids, kind, direction, position=position)
        full = family.decompose(ids, kind).dense()[position] @ direction
        assert torch.allclose(result.scores, full, atol=2e-5 * float(full.abs().max().clamp_min(1)))


@pytest.mark.parametrize(("backend", "name"), [("reference", name) for name in FAMILIES] + EACH[:-2])
def test_start_and_carry_are_decompose_in_steps(backend, name):
    family, ids = build(name), random_ids(4 if backend == "triton" else 8, seed=3)
    trace = family.trace(ids)
    for label, kind in kinds(len(ids)).items():
        state = family.start(trace, kind, backend=backend)
        for stop in [*range(state.layer + 1, family.adapter.n_layers + 1), None]:
            state = family.carry(trace, state, stop, backend=backend)
        assert close(state.dense(), family.decompose(trace, kind, backend=backend).dense()), label


def test_a_state_may_be_changed_before_it_is_carried():
    """Doubled states give doubled states where the rule is linear; every backend sees the change."""
    dp = build("llama-gqa")
    trace = dp.trace(random_ids(7))
    for kind in (Tokens(), Neurons(0)):
        for backend in ALL:
            state = dp.start(trace, kind)
            state.set_block(0, 2 * state.block(0))
            doubled = dp.carry(trace, state, allocation="taylor", backend=backend).dense()
            assert close(doubled, 2 * dp.decompose(trace, kind, allocation="taylor").dense())


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
        with pytest.raises(ValueError, match=f"end: {end} is out of range; this state reaches layers {first} to 3"):
            dp.carry(trace, dp.start(trace, kind), end)
    with pytest.raises(ValueError, match="does not hold all positions"):
        dp.carry(dp.trace(ids[:5]), dp.start(trace, Tokens()))
    with pytest.raises(ValueError, match="made by another model"):
        dp.carry(build("qwen2").trace(ids), dp.start(trace, Tokens()))


@pytest.mark.parametrize("count", [1, 3, 12])
def test_any_number_of_positions_can_be_read(family, count):
    """Few are computed one by one, many with all others."""
    ids = random_ids(13, seed=4)
    trace = family.trace([ids, ids[:6]])
    reads = [list(range(13 - count, 13)), [0, 5]]
    for kind in (Tokens(), Heads(1), Neurons(0)):
        run = family.options.build(family.adapter)
        state, errors = carried(family, trace, family.start(trace, kind), 3, run, reads)
        whole = family.decompose(trace, kind, end=3)
        for p, at in enumerate(reads):
            assert close(state.dense(p), whole.dense(p)[at]) and errors[-1][p] < 1e-5


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
    for rule in RULES:  # as on a GPU: bfloat16 products, float32 state and statistics
        assert dp.attribute(ids, Tokens(), allocation=rule, compute_dtype="bfloat16").layer_errors.max() < 1e-2
    assert not close(mixed.dense().double(), oracle, 1e-5)
    wide = dp.decompose(ids, Tokens(), compute_dtype="float64", state_dtype="float64").dense()
    assert close(wide, oracle, 1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "qwen2"])
def test_half_precision_products_are_complete_and_near(name, dtype, rule):
    """A GPU's precision: products in half precision, state and statistics in float32; in one piece and in many."""
    dp, ids = build(name), random_ids(9, seed=5)
    trace = dp.trace(ids)
    for label, kind in kinds(len(ids)).items():
        oracle = dp.decompose(trace, kind, allocation=rule, backend="reference").dense()
        for backend, budget in (("torch", 20_000), ("torch", None), ("triton", None)):
            if backend == "triton" and label not in ("tokens@0", "heads@0", "neurons@0"):
                continue  # interpreted
            if backend == "triton" and name != "qwen2" and rule != "softmax":
                continue  # a rule knows nothing of the attention, of which these differ
            options = {"allocation": rule, "compute_dtype": dtype, "memory_budget": budget, "backend": backend}
            # nothing normalises the shares of `taylor`, so the gates' rounding is in their sum
            limit = 3e-2 if rule == "taylor" else 1e-2
            assert dp.attribute(trace, kind, **options).layer_errors.max() < limit, (label, backend, budget)
            if rule in ("softmax", "taylor"):  # the others jump: at a tie, or where the smallest gate changes
                assert close(dp.decompose(trace, kind, **options).dense(), oracle, 0.1), (label, backend, budget)


# -- the corners of the allocation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
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


def gates(values, **changes) -> Gates:
    values = torch.tensor(values, dtype=torch.float64)[None, :, None]
    m = values.shape[1]
    fields = {
        "values": values,
        "total": values.sum(1),
        "alive": torch.ones(1, m, dtype=torch.bool),
        "excluded": torch.zeros(1, m, dtype=torch.bool),
        "positions": torch.zeros(1, dtype=torch.long),
        "rest": None,
    }
    return Gates(**{**fields, **changes})


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        ("softmax", [0.1, 0.2, 0.0], [0.26894142, 0.73105858, 0.0]),  # exp(1) : exp(2), the exact zero left out
        ("linear", [1.0, 2.0, 4.0], [0.0, 0.25, 0.75]),
        ("linear", [3.0, 3.0, 0.0], [0.5, 0.5, 0.0]),
        ("linear", [-3.0], [1.0]),
        ("relu", [-1.0, 1.0, 3.0], [0.0, 0.25, 0.75]),
        ("relu", [-1.0, -2.0], [0.5, 0.5]),  # nobody opens the gate: evenly among those alive
        ("max", [1.0, 5.0, 5.0], [0.0, 1.0, 0.0]),
        ("max", [-1.0, -5.0, 0.0], [1.0, 0.0, 0.0]),
        ("taylor", [1.0, 2.0, 1.0], [0.25, 0.5, 0.25]),
        ("taylor", [-1.0, 2.0], [-1.0, 2.0]),
        ("taylor", [1.0, -1.0], [0.0, 0.0]),  # gate zero, activation zero
        ("softmax", [1e4, -1e4], [1.0, 0.0]),
    ],
)
def test_rules_by_hand(rule, values, expected):
    weights = RULES[rule](gates(values), 0.1)[0, :, 0]
    assert torch.allclose(weights, torch.tensor(expected, dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize("rule", ["softmax", "linear", "relu", "max"])
def test_rest_takes_what_nobody_is_eligible_for(rule):
    nobody = gates([0.0, 0.0, 0.0], rest=0)
    assert RULES[rule](nobody, 0.1)[0, :, 0].tolist() == [1.0, 0.0, 0.0]
    excluded = gates([0.0, 2.0, 0.0], rest=0, excluded=torch.tensor([[False, True, False]]))
    assert RULES[rule](excluded, 0.1)[0, :, 0].tolist() == [1.0, 0.0, 0.0]
    alive = gates([0.0, 0.0, 0.0], alive=torch.tensor([[True, False, True]]))
    assert RULES[rule](alive, 0.1)[0, :, 0].tolist() == [0.5, 0.0, 0.5]


def test_a_rule_of_ones_own_serves_all_backends():
    def even(gates, temperature):
        weights = gates.alive[..., None].expand_as(gates.values).double()
        return (weights / weights.sum(1, keepdim=True)).to(gates.values)

    dp, ids = build("llama-gqa"), random_ids(6)
    results = [dp.attribute(ids, Tokens(), allocation=even, backend=b) for b in ALL]
    assert close(results[1].scores, results[0].scores) and close(results[2].scores, results[0].scores)
    assert results[0].allocation == "even" and results[0].completeness_error < 1e-5


@pytest.mark.parametrize(
    ("device", "size", "waits", "pins"),
    [
        ("cuda:1", 9, False, False),
        ("cuda:1", 1 << 20, False, True),
        ("mps", 1 << 20, True, False),
        ("cpu", 9, True, False),
    ],
)
def test_only_a_gpu_of_nvidia_or_amd_is_sent_host_memory_without_waiting(device, size, waits, pins):
    """CUDA copies some pageable memory aside, and only it; of more, what is pinned."""

    class Recorder:
        device, nbytes, pinned = torch.device("cpu"), size, False

        def pin_memory(self):
            self.pinned = True
            return self

        def to(self, device, non_blocking=False):
            return device, not non_blocking, self.pinned

    assert to_device(Recorder(), torch.device(device)) == (torch.device(device), waits, pins)
