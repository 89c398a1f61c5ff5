"""The planner: floors of the specification, sizes that are the real ones, and the command."""

import json

import pytest
import torch
from transformers import AutoConfig

from depass_fast import DePass, Heads, Neurons, Tokens
from depass_fast.cli.main import main
from depass_fast.planning.planner import for_config, make_plan
from depass_fast.planning.shapes import RunShape, layer_sizes
from tests.support.components import is_there, kinds
from tests.support.family_models import VARIANTS, available, build_variant
from tests.support.models import build, random_ids

LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def llama():
    return for_config(AutoConfig.for_model("llama", **LLAMA_2_7B), torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "length", "petaflop", "gigabytes"),
    [(Neurons(0), 20, 1.69, 1.8), (Tokens(), 512, 1.05, 1.1), (Tokens(), 2048, 17.2, 17.2)],
)
def test_the_floors_of_the_specification(llama, kind, length, petaflop, gigabytes):
    plan = make_plan(RunShape(llama, [length], kind), gemm_flops=790e12, device=torch.device("cpu"))
    assert plan.flop / 1e15 == pytest.approx(petaflop, rel=0.005)
    assert plan.state_bytes / 2 / 1e9 == pytest.approx(gigabytes, rel=0.03)  # in bfloat16
    assert plan.weights_bytes == pytest.approx(13.5e9, rel=0.01)
    assert plan.of("torch").seconds > plan.flop / 790e12


def test_rows_state_and_trace_are_the_real_ones(family):
    prompts = [random_ids(9, seed=1), random_ids(5, seed=2)]
    trace = family.trace(prompts)
    for label, kind in kinds(9).items():
        if label.startswith(("features", "custom")):
            continue
        plan = family.plan(prompts, kind, measure=False)
        state = family.start(trace, kind)
        assert (plan.rows, plan.state_bytes) == (state.layout.n_rows, state.nbytes), label
        assert plan.trace_bytes == trace.nbytes
        assert plan.n_components == len(state.labels_of(0))
        assert plan.layers_passed == family.adapter.n_layers - state.layer


@pytest.mark.once_a_family
@pytest.mark.parametrize("name", [name for name in VARIANTS if available(name)])
def test_every_family_can_be_planned_from_its_config(name):
    model = build_variant(name)
    from_config = for_config(model.config, torch.float32)
    dp, ids = DePass(model), random_ids(6)
    trace = dp.trace(ids)
    for kind in (kind for kind in (Tokens(), Heads(0), Neurons(0)) if is_there(dp, kind)):
        shape = RunShape(from_config, [6], kind)
        plan, real = make_plan(shape, device=torch.device("cpu")), dp.plan(ids, kind, measure=False)
        assert {**plan.to_dict(), "available_bytes": 0} == {**real.to_dict(), "available_bytes": 0}
        rows = dp.start(trace, kind).layout.n_rows
        assert rows <= plan.rows if plan.upper_bound else rows == plan.rows
    assert dp.plan(ids, "ledger", measure=False).of().peak_bytes > 0  # of layers without an MLP, too (Mamba)


@pytest.mark.once_a_family
@pytest.mark.parametrize("name", [name for name in VARIANTS if available(name)])
def test_a_gated_mlp_is_told_by_its_weights(name):
    adapter = DePass(build_variant(name)).adapter
    if adapter.family.homes is not None:  # a block has the weights of several
        assert all(size.has_up for size in layer_sizes(adapter) if size.mlps)
        return
    for index, (block, size) in enumerate(zip(adapter.blocks, layer_sizes(adapter), strict=True)):
        mixing = adapter.module(index, "attention")
        mixes = [] if mixing is None else [mixing]
        mixes += [adapter.beside(index)] if adapter.kind(index).beside is not None else []
        others = {id(weight) for one in mixes for weight in one.parameters()}
        apart = ("per_layer", "altup", "laurel", "attn_hc", "ffn_hc")  # an embedding's gate, and what mixes streams
        apart += ("attn_sconv", "mlp_sconv")  # convolutions behind branches
        others |= {id(w) for name, w in block.named_parameters() if name.startswith(apart)}
        gates = ("layernorm.", "feed_forward.receptance", "feed_forward.time_mix")  # of norms, and behind an MLP (RWKV)
        others |= {id(w) for name, w in block.named_parameters() if any(gate in name for gate in gates)}
        weights = [w for w in block.parameters() if w.ndim > 1 and id(w) not in others]
        if adapter.is_mixture(index):
            assert size.has_up
        else:
            assert sum(w.numel() for w in weights) == (3 if size.has_up else 2) * size.neurons * adapter.hidden_size


def test_a_number_of_tokens_stands_for_a_prompt():
    dp = build("llama-gqa")
    plan = dp.plan(12, Tokens(), measure=False)
    assert plan.to_dict().keys() == dp.plan(random_ids(12), Tokens(), measure=False).to_dict().keys()
    assert plan.rows == 78 and plan.fits(1 << 30) and not plan.fits(1000)
    assert (
        dp.plan(dp.trace(random_ids(12)), Tokens(), measure=False).of("torch").peak_bytes < plan.of("torch").peak_bytes
    )
    assert "tokens from layer 0, N=12" in str(plan)
    for length in (0, -3, 65, True):
        with pytest.raises(ValueError, match="length: .* is out of range; this model reads 1 to 64 tokens"):
            dp.plan(length, Tokens(), measure=False)
    with pytest.raises(KeyError, match="no backend 'magic' in this plan; it has torch"):
        plan.of("magic")


def test_an_end_spares_layers():
    dp = build("llama-gqa")
    whole, part = (dp.plan(12, Tokens(), end=end, measure=False) for end in (None, 1))
    assert part.layers_passed == 1 and part.flop * 3 == pytest.approx(whole.flop)


def test_time_rests_on_a_rate_that_is_said():
    plan = build("llama-gqa").plan(12, Tokens())
    assert plan.gemm_flops > 1e8 and "measured just now on cpu" in plan.rate_source
    assert plan.of("torch").seconds > 0 and "measured just now" in str(plan)


def test_the_command(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA_2_7B}))
    arguments = ["plan", "--model", str(tmp_path), "--length", "20", "--components", "neurons", "--layer", "0"]
    assert main([*arguments, "--json", "--dtype", "bfloat16", "--gemm-tflops", "790"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flop"] / 1e15 == pytest.approx(1.69, rel=0.005) and found["dtype"] == "bfloat16"
    assert found["gemm_flops"] == 790e12 and found["rate_source"] == "given"
    assert main([*arguments, "--gemm-tflops", "790"]) == 0
    assert "1.69 PFLOP at least" in capsys.readouterr().out
    assert main(["plan", "--model", "demo", "--prompt", "Nyria speaks", "--components", "tokens"]) == 0
    for wrong, message in (
        (["--gemm-tflops", "-1"], "--gemm-tflops: -1.0 is out of range"),
        (["--layer", "40"], "--layer: 40 is out of range; this model has layers 0 to 31"),
        (["--length", "9999"], "--length: 9999 is out of range; this model reads 1 to 4096 tokens"),
        (["--length", "many"], "'many' is not a number of tokens"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err
    arguments[3:5] = ["--prompt", "text"]
    assert main(arguments) == 2
    assert "--prompt: text needs a tokenizer" in capsys.readouterr().err
