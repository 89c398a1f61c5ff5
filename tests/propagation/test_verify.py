"""`verify=True`: a sample of positions recomputed by the reference operations; whatever is broken is noticed."""

import json
import warnings

import numpy as np
import pytest
import torch

from depass_fast import Attribution, DePass, Heads, Modules, Neurons, Tokens, Verification, VerificationWarning
from depass_fast.allocation import NAMES
from depass_fast.backends import Backend, StreamBackend, TorchBackend
from depass_fast.cli.main import main
from depass_fast.linear_rules import LINEAR_RULES
from depass_fast.options import Adjoint
from depass_fast.propagation.verify import Verifier
from tests.support.components import kinds
from tests.support.family_models import available, build_model, build_variant
from tests.support.models import FAMILIES, build, random_ids

PROMPTS = [random_ids(9, seed=1), random_ids(5, seed=2)]
OTHERS = (
    "mixtral",
    "qwen2_moe",
    "gpt_neox: parallel",
    "olmo2: biases",
    "gemma2",
    "opt: stream norms, projected embedding",
    "falcon: 40B",
    "mpt: clamped, scaled",
    "cohere",
    "granite: biases",
    "phi: QK norms",
    "gpt2",
)


@pytest.fixture(autouse=True)
def no_failure_unnoticed():
    with warnings.catch_warnings():
        warnings.simplefilter("error", VerificationWarning)
        yield


def close(one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Hold two runs to the rounding of the products: those of a watched run may have other rows, and BLAS then sums
    in another order."""
    scale = one.abs().max() if scale is None else scale
    torch.testing.assert_close(one, other, rtol=0, atol=16 * torch.finfo(one.dtype).eps * float(scale))


def unchanged_and_verified(dp, prompt, kind, limit=1e-5, **options) -> Verification:
    """The verification of an attribution, whose numbers are those of one that is not verified."""
    plain, watched = (
        dp.attribute(prompt, kind, 7, method="exact", verify=verify, **options) for verify in (False, True)
    )
    for one, other in zip(*((r if isinstance(r, list) else [r]) for r in (plain, watched)), strict=True):
        for a, b in zip(getattr(one, "by_layer", [one]), getattr(other, "by_layer", [other]), strict=True):
            close(a.scores, b.scores)
            close(a.layer_errors, b.layer_errors, scale=a.scores.abs().max())
            assert a.verification is None and b.warnings is None and a.backend == b.backend
    found = (watched[0] if isinstance(watched, list) else watched).verification
    assert found.passed and found.error < limit and found.compared and found.where
    return found


# -- what runs is verified, and stays what it is ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind(name, backend):
    dp = build(name)
    trace = dp.trace(PROMPTS[0])
    for kind in kinds(len(PROMPTS[0])).values():
        unchanged_and_verified(dp, trace, kind, backend=backend)


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_interpreted_kernels(dtype, backend):
    """The interpreter cuts off what a GPU rounds: still less than half of what rounding may explain."""
    dp = build("llama-biases")
    for kind in (Tokens(), Heads(0)):
        found = unchanged_and_verified(dp, PROMPTS[1], kind, 0.02, backend=backend, compute_dtype=dtype)
        assert found.added < found.added_limit / 2


@pytest.mark.parametrize("name", OTHERS)
def test_parallel_layers_experts_norms_anywhere_and_clamped_values(name):
    if not available(name):
        pytest.skip("not in this version of transformers")
    dp = DePass(build_variant(name))
    trace = dp.trace(PROMPTS)
    for kind in (Tokens(), Heads(1), Neurons(0), Heads(layers="all"), Neurons(layers="all")):
        unchanged_and_verified(dp, trace, kind, limit=1e-4)


@pytest.mark.parametrize("rule", NAMES)
def test_every_rule_in_every_dtype(rule):
    """In half precision a rule that jumps may be anything at a tie; float64 is held against float64."""
    for dtype, options, limit in (
        (torch.float32, {}, 1e-5),
        (torch.float64, {}, 1e-12),
        (torch.float32, {"state_dtype": "bfloat16"}, 0.02),
        (torch.float32, {"compute_dtype": "bfloat16"}, 0.09 if rule in ("softmax", *LINEAR_RULES) else 1.0),
        (torch.float32, {"compute_dtype": "float16"}, 0.03 if rule in ("softmax", *LINEAR_RULES) else 1.0),
        (torch.bfloat16, {}, 1e-5),  # what the model rounds is the trace's, which both read
    ):
        dp = build("qwen2", dtype)
        trace = dp.trace(PROMPTS)
        for kind in (Tokens(), Heads(0)):
            unchanged_and_verified(dp, trace, kind, limit, allocation=rule, **options)


def test_a_rule_of_ones_own_streaming_and_a_small_workspace():
    def even(gates, temperature):
        weights = gates.alive[..., None].expand_as(gates.values).to(gates.values)
        return weights / weights.sum(1, keepdim=True)

    dp = build("llama-biases")
    trace = dp.trace(PROMPTS)
    for kind in (Tokens(), Heads(0), Neurons(1)):
        unchanged_and_verified(dp, trace, kind, allocation=even)
        unchanged_and_verified(dp, trace, kind, stream=True, memory_budget=3000)
        unchanged_and_verified(dp, trace, kind, memory_budget=3000)


def test_all_results_carry_it():
    dp = build("qwen2")
    trace = dp.trace(PROMPTS)
    state = dp.decompose(trace, Tokens(), verify=True)
    assert state.verification.passed and dp.decompose(trace, Tokens()).verification is None
    state = dp.carry(trace, dp.start(trace, Heads(0), verify=True), end=2, verify=True)
    assert state.verification.passed and state.verification.compared == 3 * 3  # heads start behind the attention
    found = dp.attribute_generation(PROMPTS[0], max_new_tokens=3, verify=True)
    assert (
        found.verification.passed
        and "| verified: " in str(found)
        and "verified" not in str(dp.attribute_generation(PROMPTS[0], max_new_tokens=3))
    )
    always = DePass(dp.model, verify=True)
    assert always.attribute(trace, Tokens())[1].verification.passed
    assert always.attribute(trace, Tokens(), verify=False)[1].verification is None
    assert always.attribute(trace, Neurons(2), torch.ones(32), end=3)[0].verification.compared > 0  # a readout only


def test_how_much_is_compared():
    """Three positions per step, and up to four of those that are read; in the last layer the latter only."""
    dp = build("llama-gqa")
    found = dp.attribute(random_ids(30), Tokens(), verify=True).verification
    assert found.compared == 2 * 2 * (1 + 3) + 2 + 1  # two layers of two steps, the last layer's, the readout
    assert dp.attribute(random_ids(30), Tokens(), verify=True).verification == found  # drawn by a fixed seed
    many = dp.attribute([random_ids(6, seed=s) for s in range(9)], Heads(0), verify=True)
    assert many[0].verification.compared == 3 * (4 + 3) + 2 * 4 + 4  # heads start behind the attention
    assert len({result.verification for result in many}) == 1


# -- what is broken is noticed ----------------------------------------------------------------------------------------


def breaks(monkeypatch, backend, step, what=lambda state, out: out.rows.mul_(1.01)):
    """Lets a step of a backend go wrong by what ``what`` does to its outcome."""
    right = getattr(backend, step)

    def wrong(self, state, *arguments, **more):
        layer = state.layer
        out = right(self, state, *arguments, **more)
        what(layer, out)
        return out

    monkeypatch.setattr(backend, step, wrong)


def fails(call) -> Attribution:
    with pytest.warns(VerificationWarning, match="verify: the .* backend is off the reference operations by"):
        return call()


@pytest.mark.parametrize(
    ("step", "named"), [("aggregate_ov", "the attention of layer"), ("allocate_mlp", "the MLP of layer")]
)
def test_a_broken_step_is_named(step, named, monkeypatch):
    dp = build("qwen2")
    trace = dp.trace(PROMPTS)
    breaks(monkeypatch, TorchBackend, step)
    for kind in (Tokens(), Heads(0), Modules(1), Neurons(0)):
        for result in fails(lambda kind=kind: dp.attribute(trace, kind, 7, verify=True)):
            found = result.verification
            assert found.error == pytest.approx(0.01, rel=0.05) and not found.passed and named in found.where
            assert "of prompt" in found.where and found.where in result.warnings[0]
        assert "WARNING: the torch backend is" in str(result) and "approximate" not in str(result)
    fails(lambda: dp.decompose(trace, Tokens(), verify=True))
    oracle = dp.attribute(trace, Tokens(), 7, verify=True, backend="reference")
    assert oracle[0].verification.passed


DTYPES = {
    "float32": {},
    "float64": {"state_dtype": "float64", "compute_dtype": "float64"},
    "products in bfloat16": {"compute_dtype": "bfloat16"},
    "products in float16": {"compute_dtype": "float16"},
    "state in bfloat16": {"state_dtype": "bfloat16"},
    "all in bfloat16": {"state_dtype": "bfloat16", "compute_dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def weak() -> DePass:
    """A model whose steps add about 1 % to the states."""
    model = build_model("llama", num_key_value_heads=2)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.0025
        layer.mlp.down_proj.weight.data *= 0.0017
    return DePass(model)


@pytest.mark.parametrize("much", [0.0, 0.5, 1.5], ids=["dropped", "halved", "half too much"])
@pytest.mark.parametrize("step", ["aggregate_ov", "allocate_mlp"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_weak_step_that_is_wrong_is_found(dtypes, step, much, weak, monkeypatch):
    """Held against whole rows it would not be, in half precision: a hundredth is within what they may be off."""
    trace, right, shares = weak.trace(PROMPTS), getattr(TorchBackend, step), []
    unchanged_and_verified(weak, trace, Heads(0), 0.03, **DTYPES[dtypes])

    def wrong(self, state, *arguments, **more):
        before = state.rows.double().clone()
        out = right(self, state, *arguments, **more)
        if out.rows.shape == before.shape:  # else the last layer's, of few positions
            added = out.rows.double() - before
            shares.append(float(added.norm() / before.norm()))
            out.rows.copy_(before + much * added)
        return out

    monkeypatch.setattr(TorchBackend, step, wrong)
    result = fails(lambda: weak.attribute(trace, Heads(0), 7, verify=True, **DTYPES[dtypes]))[0]
    found, named = result.verification, "attention" if step == "aggregate_ov" else "MLP"
    assert 0.003 < min(shares) <= max(shares) < 0.03
    assert found.added > found.added_limit and f"the {named} of layer" in found.added_where
    assert f"in what is added by {found.added_where}" in result.warnings[0]
    if "bfloat16" in dtypes:
        assert found.error < found.limit


def test_a_broken_readout_is_named(monkeypatch):
    dp = build("llama-gqa")
    right = TorchBackend.read_out
    monkeypatch.setattr(TorchBackend, "read_out", lambda *arguments: right(*arguments) * 1.01)
    result = fails(lambda: dp.attribute(PROMPTS[0], Tokens(), [7, (3, 4)], verify=True))
    assert result.verification.where == "the readout, position 8"


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_where_it_is_broken_in_one_layer_at_the_position_that_is_read(layer, monkeypatch):
    dp, ids = build("llama-gqa"), random_ids(40)

    def break_one(at, out):
        if at == layer:
            segment = int(np.flatnonzero(out.layout.local == 31)[0])
            out.rows[out.layout.starts[segment] : out.layout.starts[segment + 1]] += 0.1

    breaks(monkeypatch, TorchBackend, "aggregate_ov", break_one)
    result = fails(lambda: dp.attribute(ids, Tokens(), 7, position=31, verify=True))
    assert result.verification.where == f"the attention of layer {layer}, position 31"


def test_a_sweep_that_is_broken_for_one_of_its_decompositions(monkeypatch):
    dp = build("llama-biases")
    trace = dp.trace(PROMPTS)

    def break_joint(at, out):
        if out.layout.positions is not None:
            mine = out.layout.prompt[out.layout.row_segments()] >= 2 * trace.n_prompts - 2
            out.rows[torch.from_numpy(np.flatnonzero(mine))] *= 1.01

    breaks(monkeypatch, TorchBackend, "allocate_mlp", break_joint)
    for found in fails(lambda: dp.attribute(trace, Heads(layers="all"), 7, verify=True)):
        assert not found.verification.passed and "WARNING: the torch backend" in str(found)
        assert found.to_dict()["verification"]["error"] == found.verification.error
        assert all(result.verification == found.verification for result in found)


def test_a_broken_expert_and_a_broken_stream(monkeypatch):
    if not available("mixtral"):
        pytest.skip("not in this version of transformers")
    dp = DePass(build_variant("mixtral"))
    breaks(monkeypatch, TorchBackend, "allocate_mlp")
    result = fails(lambda: dp.attribute(PROMPTS[0], Tokens(), 7, verify=True))
    assert result.verification.where.startswith("expert E")
    monkeypatch.undo()
    breaks(monkeypatch, StreamBackend, "allocate_mlp")
    result = fails(lambda: build("qwen2").attribute(PROMPTS[0], Tokens(), 7, verify=True, stream=True))
    assert "the torch, streamed backend is" in result.warnings[0]


def test_what_is_no_number_is_no_success(monkeypatch):
    dp = build("llama-gqa")
    breaks(monkeypatch, TorchBackend, "allocate_mlp", lambda at, out: out.rows.mul_(float("nan")))
    state = fails(lambda: dp.decompose(PROMPTS[0], Tokens(), verify=True))
    assert state.verification.error == float("inf")
    with pytest.raises(FloatingPointError, match="the components hold NaN or inf"):
        fails(lambda: dp.attribute(PROMPTS[0], Tokens(), verify=True))


# -- files, words, refusals -------------------------------------------------------------------------------------------


def test_files_and_plain_values(tmp_path):
    dp = build("qwen2")
    for kind in (Tokens(), Heads(layers="all")):
        result = dp.attribute(PROMPTS[0], kind, verify=True)
        result.save(tmp_path / "result.safetensors")
        assert Attribution.load(tmp_path / "result.safetensors").verification == result.verification
        found = json.loads(json.dumps(result.to_dict(), allow_nan=False))["verification"]
        assert Verification(**found) == result.verification
        assert f"verified: {result.verification} | " in str(result)
        plain = dp.attribute(PROMPTS[0], kind)
        assert plain.to_dict()["verification"] is None and "verified" not in str(plain)


def test_what_cannot_be_verified_is_refused_before_any_work(monkeypatch):
    dp = build("llama-gqa")
    trace = dp.trace(PROMPTS[0])
    partition = dp.partition(trace, Tokens())
    monkeypatch.setattr(dp.adapter.model, "forward", None)
    for call in (
        lambda: dp.attribute(PROMPTS[0], Neurons(0), method="adjoint", verify=True),
        lambda: dp.attribute(PROMPTS[0], Neurons(layers="all"), method=Adjoint(refine=3), verify=True),
    ):
        with pytest.raises(ValueError, match="verify: method='adjoint' carries no states"):
            call()
    for call in (
        lambda: dp.partition(PROMPTS[0], Tokens(), verify=True),
        lambda: dp.focus(trace, Tokens(), [1], partition=partition, verify=True),
    ):
        with pytest.raises(ValueError, match="verify: focus and partition share out"):
            call()
    with pytest.raises(TypeError, match="verify: expected True or False, got 'yes'"):
        dp.attribute(PROMPTS[0], Tokens(), verify="yes")


def test_the_command_line(capsys, monkeypatch):
    arguments = ["attribute", "--model", "demo", "--device", "cpu", "--prompt", "Nyria Morstam speaks", "--verify"]
    assert main([*arguments, "--components", "heads", "--layer", "3"]) == 0
    assert "| verified: " in capsys.readouterr().out
    assert main([*arguments, "--components", "tokens", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["verification"]
    assert 0 < found["error"] < 1e-5 < found["limit"] and found["compared"] > 20 and "layer" in found["where"]
    assert main([*arguments, "--components", "neurons", "--layer", "1", "--method", "adjoint"]) == 2
    assert "error: --verify: --method adjoint carries no states" in capsys.readouterr().err
    breaks(monkeypatch, TorchBackend, "allocate_mlp")
    assert main([*arguments, "--components", "tokens"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("WARNING: the torch backend is") and "Warning" not in shown.err


def test_a_watched_backend_is_in_every_respect_the_one_that_is_watched(monkeypatch):
    """Whatever a caller may ask of a backend is passed on: nothing of the protocol is left at its default."""
    asked = [name for name in vars(Backend) if not name.startswith("_")]
    assert {"expect", "prepare", "workspace_bytes", "streams"} < set(asked)
    backend = StreamBackend(torch.device("cpu"), torch.bfloat16, 12_345)
    watched = Verifier().around(backend)
    for name in asked:
        if not callable(getattr(Backend, name)):
            assert getattr(watched, name) == getattr(backend, name), name
        else:
            assert name in vars(type(watched)), name
    assert watched.workspace_bytes(torch.device("cpu")) == 12_345
    seen = []
    monkeypatch.setattr(backend, "expect", lambda *given: seen.append(given))
    monkeypatch.setattr(backend, "prepare", lambda *given: seen.append(given))
    monkeypatch.setattr(backend, "begin", lambda *given: seen.append(given))
    watched.expect(1, 2, 3)
    watched.prepare(4, 5)
    watched.begin(6, 7, 8, 9)
    assert seen == [(1, 2, 3), (4, 5), (6, 7, 8, 9)]
