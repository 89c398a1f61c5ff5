"""The types that an editor knows are those that calls return. pyright reads this file, and pytest runs it."""
# pyright: reportUnnecessaryTypeIgnoreComment=error

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from typing_extensions import assert_type

from depass_fast import (
    Adjoint,
    AttentionCredit,
    AttentionExplanation,
    Attribution,
    ComponentKind,
    ComponentState,
    Continuation,
    Contrast,
    Custom,
    DePass,
    Features,
    Heads,
    LayeredAttribution,
    LogProb,
    Modules,
    Neurons,
    Subspaces,
    Tokens,
)
from depass_fast.allocation import NAMES, softmax
from depass_fast.backends import BACKENDS
from depass_fast.options import BackendName, RuleName
from tests.support.components import Dictionary

TEXT, IDS = "Nyria Morstam speaks", [3, 5, 7]


def test_one_layer_of_one_prompt_gives_an_attribution(demo: DePass):
    width = demo.adapter.hidden_size
    results = [
        assert_type(demo.attribute(TEXT, Tokens()), Attribution),
        assert_type(demo.attribute(TEXT, Heads(1)), Attribution),
        assert_type(demo.attribute(TEXT, Modules(1, "mlp")), Attribution),
        assert_type(demo.attribute(TEXT, Modules("blocks.1.hook_mlp_out")), Attribution),
        assert_type(demo.attribute(IDS, Neurons(1), method="adjoint"), Attribution),
        assert_type(demo.attribute((3, 5, 7), Neurons(layer=1, layers=None)), Attribution),
        assert_type(demo.attribute(IDS, Subspaces(1, bases=[torch.eye(width)[:, :2]])), Attribution),
        assert_type(demo.attribute(IDS, Subspaces(1, [np.ones(width)], ["probe"])), Attribution),
        assert_type(demo.attribute(IDS, Features(1, Dictionary(width=width), "resid_post")), Attribution),
        assert_type(demo.attribute(IDS, Custom(1, states=torch.zeros(3, 1, width))), Attribution),
        assert_type(demo.attribute(IDS, Custom(1, [np.zeros((3, width))])), Attribution),
    ]
    assert all(type(result) is Attribution for result in results)


def test_attention_is_explained_prompt_by_prompt(demo: DePass):
    one = assert_type(demo.explain_attention(TEXT, Tokens(), 1, 2, key=(0, 2)), AttentionExplanation)
    several = assert_type(demo.explain_attention([TEXT], Tokens(), layer=1), list[AttentionExplanation])
    assert_type(demo.head_weights(IDS, 1, 0), torch.Tensor)
    assert_type(demo.head_weights([IDS, IDS], 1), list[torch.Tensor])
    credit = assert_type(demo.attention_credit(IDS, Heads(1), 3, rule="half"), AttentionCredit)
    credits = assert_type(demo.attention_credit([IDS, IDS], Heads(1)), list[AttentionCredit])
    assert one.asked == "pair" and len(several) == 1 and len(credits) == 2 and credit.rule == "half"


def test_several_layers_of_one_prompt_give_a_layered_attribution(demo: DePass):
    layered = demo.attribute(TEXT, Neurons(layers="all"), method=Adjoint(refine=0, sample=0))
    assert_type(layered, LayeredAttribution)
    assert_type(layered[5], Attribution)
    assert_type(layered.layers, list[int])
    assert_type(layered.rest, Tensor)
    assert layered[5].layer == 5 and layered.layers[5] == 5
    width = demo.adapter.hidden_size
    sae = Dictionary(width=width)
    results = [
        layered,
        assert_type(demo.attribute(IDS, Heads(layers=[1])), LayeredAttribution),
        assert_type(demo.attribute(IDS, Heads(layers=["blocks.1.attn.hook_z", 2])), LayeredAttribution),
        assert_type(demo.attribute(IDS, Modules(which="mlp", layers=range(2))), LayeredAttribution),
        assert_type(demo.attribute(IDS, Subspaces(bases=[torch.ones(width)], layers=[0, 2])), LayeredAttribution),
        assert_type(demo.attribute(IDS, Subspaces(layers=[0], bases={0: [np.ones(width)]})), LayeredAttribution),
        assert_type(demo.attribute(IDS, Features(layers=[0], sae={0: sae}, site="resid_mid")), LayeredAttribution),
    ]
    assert all(type(result) is LayeredAttribution for result in results)


def test_several_prompts_give_a_list(demo: DePass):
    single = [
        *assert_type(demo.attribute([TEXT], Tokens()), list[Attribution]),
        *assert_type(demo.attribute([IDS, [3]], Heads(1)), list[Attribution]),
    ]
    layered = assert_type(demo.attribute([TEXT, TEXT], Modules(layers="all")), list[LayeredAttribution])
    assert [type(result) for result in [*single, *layered]] == [Attribution] * 3 + [LayeredAttribution] * 2


def test_several_positions_and_a_continuation(demo: DePass):
    one, several = demo.attribute(TEXT, Tokens(), position=-1), demo.attribute(TEXT, Tokens(), position=[0, -1])
    assert_type(one, Attribution)
    assert_type(several, list[Attribution])
    assert_type(demo.attribute(TEXT, Modules(layers="all"), position=[0, -1]), list[LayeredAttribution])
    given = assert_type(demo.attribute(TEXT, Tokens(), continuation=" Italian"), Continuation[Attribution])
    assert_type(given.sum, Attribution)
    layered = demo.attribute(IDS, Modules(layers="all"), continuation=[3])
    assert_type(layered, Continuation[LayeredAttribution])
    assert_type(layered.steps, list[LayeredAttribution])
    assert [type(result) for result in [one, *several, given, layered.sum]] == [
        *[Attribution] * 3,
        Continuation,
        LayeredAttribution,
    ]


def test_targets_that_have_names(demo: DePass):
    one = assert_type(demo.attribute(TEXT, Tokens(), LogProb(" Italian")), Attribution)
    other = assert_type(demo.attribute(IDS, Heads(layers=[1]), [LogProb(), Contrast(3, 5)]), LayeredAttribution)
    several = assert_type(demo.attribute([TEXT], Tokens(), targets=[LogProb()]), list[Attribution])
    assert_type(LogProb().token, int | str | None)
    assert_type(one.target_kinds, list[str] | None)
    assert (one.target_kinds, other.target_kinds) == (["log-prob"], ["log-prob", "contrast"])
    assert several[0].target_kinds == one.target_kinds


def test_the_chat_of_one_prompt_and_of_several(demo: DePass):
    one = assert_type(demo.attribute([{"role": "user", "content": TEXT}], Tokens()), Attribution)
    several = assert_type(demo.attribute([[{"role": "user", "content": TEXT}]], Tokens()), list[Attribution])
    assert several[0].input_ids == one.input_ids


def test_what_only_the_run_tells_is_not_promised(demo: DePass):
    trace = demo.trace([TEXT])
    assert_type(demo.attribute(trace, Tokens()), Any)  # a list if it is the trace of a list
    assert_type(demo.attribute(torch.tensor([IDS, IDS]), Tokens()), Any)  # a list if it has two rows

    def either(components: ComponentKind) -> None:
        assert_type(demo.attribute(TEXT, components), Any)

    either(Tokens())


def test_states(demo: DePass):
    trace = demo.trace(TEXT)
    start = assert_type(demo.start(trace, Heads(1)), ComponentState)
    assert_type(start.completeness_error, float | None)
    assert start.completeness_error is None
    for state in (demo.carry(trace, start, end=3), demo.decompose(TEXT, Heads(1))):
        assert isinstance(state.completeness_error, float)


def test_options_are_words_that_there_are(demo: DePass):
    assert get_args(RuleName) == tuple(NAMES) and get_args(BackendName) == ("auto", *BACKENDS)
    demo.attribute(IDS, Tokens(), backend="reference", allocation="linear", stream=False, method="exact")
    demo.attribute(IDS, Tokens(), allocation=softmax, stream="auto")
    with pytest.raises(ValueError, match="backend: "):
        demo.attribute(IDS, Tokens(), backend="cuda")  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(ValueError, match="allocation: "):
        demo.attribute(IDS, Tokens(), allocation="hard")  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(ValueError, match="stream: "):
        demo.attribute(IDS, Tokens(), stream="yes")  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(ValueError, match="method: "):
        demo.attribute(IDS, Tokens(), method="fast")  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(ValueError, match="layers: "):
        demo.attribute(IDS, Neurons(layers="every"))


def test_kinds_that_know_their_result_are_dataclasses_as_before():
    assert repr(Heads(1)) == "Heads(layer=1, layers=None)"
    assert Neurons(layers=[1]) == Neurons(layers=[1]) != Neurons(1)
    assert hash(Heads(2)) == hash(replace(Heads(1), layer=2))
    assert pickle.loads(pickle.dumps(Modules(1, "mlp"))) == Modules(1, "mlp")
    assert pickle.loads(pickle.dumps(Neurons(layers="all"))) == Neurons(layers="all")
