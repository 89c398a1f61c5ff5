"""Positions behind the one that is read cost nothing: a readout there is that of the prompt up to it."""

import pytest
import torch

from depass_fast import Custom, DePass, Features, Heads, Modules, Neurons, Subspaces, Tokens
from depass_fast.propagation import loop
from depass_fast.trace.first import first_positions
from tests.support.components import Dictionary
from tests.support.family_models import available, build_variant
from tests.support.models import build, random_ids
from tests.support.plans import assert_same

IDS = random_ids(20)
READ = 6


def kinds(length):
    states = torch.linspace(-1, 1, len(IDS) * 3 * 32).view(-1, 3, 32)[:length] * 0.1
    return {
        "tokens": Tokens(),
        "heads": Heads(1),
        "heads of all layers": Heads(layers="all"),
        "neurons": Neurons(1),
        "modules": Modules(0),
        "subspaces": Subspaces(1, [torch.eye(32)[:, :4]]),
        "features": Features(1, Dictionary(), site="resid_pre"),
        "custom": Custom(1, states),
    }


def same(read, prefix):
    if isinstance(read, list):
        assert len(read) == len(prefix)
        for pair in zip(read, prefix, strict=True):
            same(*pair)
        return
    n = len(prefix.tokens)
    if read.components == "tokens":  # those that come later have no share
        assert read.labels[:n] == prefix.labels[:n] and not read.scores[n : len(read.tokens)].any()
        assert read.labels[len(read.tokens) :] == prefix.labels[n:]
        read.scores = torch.cat([read.scores[:n], read.scores[len(read.tokens) :]])
    else:
        assert read.labels == prefix.labels
    torch.testing.assert_close(read.scores, prefix.scores, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(read.target_logits, prefix.target_logits, atol=2e-5, rtol=1e-4)
    assert read.completeness_error < 1e-5


@pytest.mark.parametrize("name", kinds(1))
@pytest.mark.parametrize("model", ["llama-biases", "mistral-window"])
def test_the_shares_are_those_of_the_prefix(model, name):
    dp = build(model)
    read = dp.attribute(IDS, kinds(len(IDS))[name], 3, position=READ)
    same(read, dp.attribute(IDS[: READ + 1], kinds(READ + 1)[name], 3))


def test_a_given_trace_and_a_direction_at_a_layer_s_input():
    dp = build("llama-gqa")
    trace = dp.trace(IDS)
    for arguments in ({"target": 3}, {"target": torch.ones(32), "end": 2}):
        read = dp.attribute(trace, Tokens(), position=READ, **arguments)
        same(read, dp.attribute(IDS[: READ + 1], Tokens(), **arguments))
    assert trace.length(0) == len(IDS)  # it is as it was


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_prompts_of_different_lengths(backend):
    dp, prompts = build("qwen2"), [IDS, IDS[3:14], IDS[5:12]]
    read = dp.attribute(prompts, Tokens(), 3, position=4, backend=backend)
    same(read, dp.attribute([ids[:5] for ids in prompts], Tokens(), 3, backend=backend))


@pytest.mark.parametrize("options", [{"stream": True}, {"verify": True}, {"exclude_special": [1, 15]}])
def test_options_hold_for_what_is_carried(options):
    dp = build("llama-gqa")
    fewer = options if "exclude_special" not in options else {"exclude_special": [1]}
    read = dp.attribute(IDS, Tokens(), 3, position=READ, **options)
    same(read, dp.attribute(IDS[: READ + 1], Tokens(), 3, **fewer))
    assert read.verification is None or read.verification.passed


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "bloom", "gemma2", "deepseek_v3"])
def test_experts_sinks_and_biases_of_keys(family):
    if not available(family):
        pytest.skip("this version of transformers does not have it")
    dp = DePass(build_variant(family))
    prompts = [IDS, IDS[4:15]]
    for kind in (Tokens(), Heads(0)) + ((Neurons(1),) if family == "mixtral" else ()):
        read = dp.attribute(prompts, kind, 3, position=READ)
        same(read, dp.attribute([ids[: READ + 1] for ids in prompts], kind, 3))


def test_the_sweep_reads_the_same_features():
    dp = build("llama-gqa")
    kind = Features(1, Dictionary(), site="resid_pre")
    read = dp.attribute(IDS, kind, 3, position=READ, method="adjoint", temperature=1.0)
    same(read, dp.attribute(IDS[: READ + 1], kind, 3, method="adjoint", temperature=1.0))


def test_no_row_behind_the_readout_is_carried(monkeypatch):
    dp, rows = build("llama-gqa"), []
    step = loop.through_layer
    monkeypatch.setattr(loop, "through_layer", lambda state, *rest: rows.append(len(state.rows)) or step(state, *rest))
    dp.attribute(IDS, Tokens(), 3, position=READ)
    assert max(rows) == (READ + 1) * (READ + 2) // 2
    rows.clear()
    dp.decompose(IDS, Tokens())
    assert max(rows) == len(IDS) * (len(IDS) + 1) // 2


def test_the_plan_is_that_of_the_shorter_run():
    dp = build("llama-gqa")
    whole, cut, prefix = (
        dp.plan(n, Tokens(), position=at, measure=False) for n, at in ((40, None), (40, READ), (READ + 1, None))
    )
    assert cut.rows == prefix.rows < whole.rows and cut.flop == prefix.flop
    assert cut.trace_bytes == whole.trace_bytes  # the forward pass goes over all of the prompt
    assert_same(dp.plan(40, Tokens(), position=-1, measure=False), whole)


def test_a_trace_of_first_positions_shares_memory_for_one_prompt():
    trace = build("llama-gqa").trace(IDS)
    cut = first_positions(trace, [READ + 1])
    assert cut.layers[0].resid_pre.data_ptr() == trace.layers[0].resid_pre.data_ptr()
    assert cut.layers[1].attention.resid is cut.layers[1].resid_pre
    assert first_positions(trace, [len(IDS)]) is trace
