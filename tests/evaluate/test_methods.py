"""Every method's scores against plain runs, loops and autograd of the model, and against captum where it is there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from depass_fast import Adjoint, DePass, Heads, Neurons, Tokens
from depass_fast.demo import load_demo
from depass_fast.evaluate.interventions import replacement_id
from depass_fast.evaluate.methods import base
from depass_fast.evaluate.methods.attention import rollout
from depass_fast.evaluate.methods.gradients import gradient_times_activation
from depass_fast.evaluate.methods.integrated import integrated_gradients, mean_embedding
from depass_fast.evaluate.methods.relevance import CREDIT, copied
from depass_fast.evaluate.methods.scores import METHODS, scores_of
from depass_fast.evaluate.questions import READS, Question, answered, read_texts
from tests.support.family_models import build_model, build_variant
from tests.support.linearised import Linearised, frozen
from tests.support.models import random_ids
from tests.support.tokenizers import byte_level

N = 6
BLIND = (base.ROLLOUT, base.LAST_ATTENTION, base.NORM, base.RANDOM, base.PUBLISHED_NORM)  # they know of no target


def question_of(*special: int) -> Question:
    is_special = torch.zeros(N, dtype=torch.bool)
    is_special[list(special)] = True
    return Question(0, "", "", torch.tensor(random_ids(N)), 5, 9, is_special)


@pytest.fixture(scope="module")
def demo() -> DePass:
    return DePass(*load_demo(), progress=False)


@pytest.fixture(scope="module")
def asked(demo) -> Question:
    return next(one for one in answered(demo, read_texts(None)) if one is not None)


@pytest.fixture(scope="module")
def small() -> DePass:
    return DePass(
        build_model("llama", num_key_value_heads=2, vocab_size=300, implementation="eager"),
        byte_level(),
        progress=False,
    )


def values(engine: DePass, question: Question, ids: Tensor) -> Tensor:
    """The reads (3,) of a plain run."""
    with torch.no_grad():
        logits = engine.model(ids[None]).logits[0, -1]
    log_p = logits.log_softmax(-1)
    t, f = question.target, question.foil
    return torch.stack([logits[t], log_p[t], logits[t] - logits[f]])


def stacked(scores: base.Scores, method: str) -> Tensor:
    return torch.stack([scores[method, read] for read in READS])


# -- all of them ----------------------------------------------------------------------------------------------------


def test_every_method_scores_what_it_is_made_for(small):
    facts: dict = {}
    found = scores_of(small, question_of(), base.KINDS, facts=facts, steps=16)
    layers, heads = small.adapter.n_layers, small.adapter.attention(0).n_heads
    for kind, shape in {"tokens": (N,), "heads": (layers, heads), "neurons": (layers, 48)}.items():
        for (method, read), scores in found[kind].items():
            assert scores.shape == shape and scores.dtype == torch.float32 and scores.isfinite().all()
            assert (read == "-") == (method in BLIND)
        assert len(found[kind]) == sum(1 if name in BLIND else 3 for name in {name for name, _ in found[kind]})
    assert {name for kind in found.values() for name, _ in kind} == set(METHODS)
    assert not {base.LINEAR, base.RELU, base.MAX} & {name for name, _ in found["neurons"]}
    assert (base.DELETED, "logit") not in found["heads"]  # only by name
    assert facts["left out"] == {} and len(facts["completeness"]) == 3 and facts["seconds"][base.SOFTMAX] > 0


def test_some_methods_by_name(small):
    found = scores_of(small, question_of(), ["heads"], only=[base.RANDOM, base.ROLLOUT])
    assert found.keys() == {"heads"} and found["heads"].keys() == {(base.RANDOM, "-")}
    again, other = (scores_of(small, question_of(), ["tokens", "heads"], only=[base.RANDOM], seed=s) for s in (0, 1))
    assert torch.equal(again["heads"][base.RANDOM, "-"], found["heads"][base.RANDOM, "-"])
    assert not torch.equal(other["heads"][base.RANDOM, "-"], found["heads"][base.RANDOM, "-"])


def test_what_is_refused(small):
    with pytest.raises(ValueError, match="only: expected some of 'softmax', .*, got 'saliency'"):
        scores_of(small, question_of(), only=["saliency"])
    with pytest.raises(ValueError, match="kinds: expected some of 'tokens', 'heads', 'neurons', got 'tokens'"):
        scores_of(small, question_of(), "tokens")
    mixture = DePass(build_variant("mixtral"), byte_level(), progress=False)
    with pytest.raises(ValueError, match="mixture of experts, whose neurons"):
        scores_of(mixture, question_of(), ["neurons"])
    with pytest.raises(ValueError, match="AttnLRP: the model is a mixture of experts, .* Take it out of `only`"):
        scores_of(mixture, question_of(), only=[base.ATTN_LRP])
    one = Question(0, "", "", torch.tensor([7]), 5, 9, torch.zeros(1, dtype=torch.bool))
    facts: dict = {}
    found = scores_of(small, one, facts=facts, steps=8)["tokens"]
    assert facts["left out"] == {base.DELETED: "nothing is left of a prompt of one token without it."}
    assert (base.REPLACED, "logit") in found and (base.DELETED, "logit") not in found


# -- DePass ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["softmax", "max", "shapley"])
def test_rules_are_those_of_attribute(small, rule):
    question = question_of()
    found = scores_of(small, question, base.KINDS, only=[rule])
    how = {"allocation": rule, "method": "exact"}
    tokens = small.attribute(question.ids, Tokens(), question.targets, **how).scores[:, :N]
    heads = small.attribute(question.ids, Heads(layers="all"), question.targets, **how).scores
    torch.testing.assert_close(stacked(found["tokens"], rule), tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stacked(found["heads"], rule), heads, rtol=1e-4, atol=1e-5)
    if rule != "max":
        method = Adjoint(refine=200, sample=0) if rule == "softmax" else "adjoint"
        neurons = small.attribute(question.ids, Neurons(layers="all"), question.targets, allocation=rule, method=method)
        torch.testing.assert_close(stacked(found["neurons"], rule), neurons.scores, rtol=1e-4, atol=1e-5)


class Shared(Linearised):
    """The linear copy with attention's credit shared as AttnLRP does: a quarter to Q and K each, half to V."""

    def _attention(self, eager):
        def attention(module, query, key, value, *args, **kwargs):
            query, key = (frozen(x, x / 4) for x in (query, key))
            z, p = eager(module, query, key, frozen(value, value / 2), *args, **kwargs)
            return self._keep("heads", module.layer_idx, z), p

        return attention


@pytest.mark.parametrize("rule", ["half", "shapley"])
@pytest.mark.parametrize(("family", "more"), [("llama", {"num_key_value_heads": 2}), ("gpt_neox", {})])
def test_relevance_is_that_of_a_copy_by_hand(family, more, rule):
    engine = DePass(build_model(family, implementation="eager", **more).double(), progress=False)
    question = question_of()
    with copied(engine, engine.trace(question.ids), rule, CREDIT):
        found = gradient_times_activation(engine, question.ids, question.values, ["tokens"])["tokens"]
    _, expected = Shared(engine.model, question.ids.tolist(), rule).scores(lambda logits: logits[question.target], -1)
    expected = list(expected["tokens", 0].values())
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=found.dtype), rtol=1e-5, atol=1e-7)
    assert engine.adapter.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("family", "more"), [("qwen3", {"num_key_value_heads": 2, "head_dim": 16}), ("olmo2", {}), ("gemma3_text", {})]
)
def test_relevance_without_queries_and_keys_is_the_ledger(family, more):
    engine, question = DePass(build_model(family, **more), progress=False), question_of()
    trace = engine.trace(question.ids)
    with copied(engine, trace, "half", 0.0):
        found = gradient_times_activation(engine, question.ids, question.values)
    book = engine.ledger(trace, question.targets, rule="half")
    for kind, expected in (("tokens", book.tokens().scores[:, :N]), ("heads", book.heads().scores)):
        torch.testing.assert_close(found[kind], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["neurons"], book.neurons().scores, rtol=1e-3, atol=1e-4)


# -- gradients ------------------------------------------------------------------------------------------------------


def by_autograd(engine: DePass, question: Question) -> Tensor:
    """Gradient × embedding (3, N), through ``inputs_embeds``."""
    model: Any = engine.model
    embedded = model.get_input_embeddings()(question.ids[None]).detach().requires_grad_()
    reads = question.values(model(inputs_embeds=embedded).logits[0, -1])
    gradients = [torch.autograd.grad(read, embedded, retain_graph=True)[0] for read in reads]
    return torch.stack([(g * embedded).sum(-1)[0] for g in gradients]).detach()


def test_gradients_are_those_of_autograd(small):
    question, n_heads = question_of(), small.adapter.attention(0).n_heads
    found = scores_of(small, question, base.KINDS, only=[base.GRADIENT, base.GRADIENT_INPUT])
    torch.testing.assert_close(stacked(found["tokens"], base.GRADIENT_INPUT), by_autograd(small, question))
    torch.testing.assert_close(
        question.values(small.model(question.ids[None]).logits[0, -1]), values(small, question, question.ids)
    )
    for kind, part, width in (("neurons", "down_proj", 1), ("heads", "o_proj", 32 // n_heads)):
        # the fall when one component goes is about that of its first-order term where little of it goes
        layer, which, step = 1, 2, 1e-2
        scores = stacked(found[kind], base.GRADIENT)[:, layer, which]
        shrunk = []
        for factor in (1 - step, 1 + step):
            weight = small.adapter.module(layer, part).weight
            kept = weight.detach().clone()
            with torch.no_grad():
                weight[:, which * width : (which + 1) * width] *= factor
                shrunk.append(values(small, question, question.ids))
                weight.copy_(kept)
        torch.testing.assert_close((shrunk[1] - shrunk[0]) / (2 * step), scores, rtol=5e-3, atol=1e-3)


def test_gradients_of_captum(small):
    attr = pytest.importorskip("captum.attr")
    question, projection = question_of(), small.adapter.module(1, "down_proj")
    found = scores_of(small, question, ["neurons"], only=[base.GRADIENT])["neurons"]

    def read(ids):
        return question.values(small.model(ids).logits[:, -1])

    method = attr.LayerGradientXActivation(read, projection)
    each = [method.attribute(question.ids[None], target=i, attribute_to_layer_input=True)[0].sum(0) for i in range(3)]
    torch.testing.assert_close(stacked(found, base.GRADIENT)[:, 1], torch.stack(each).detach(), rtol=1e-4, atol=1e-6)


def test_integrated_gradients_are_complete(demo, asked, small):
    for engine, question in ((demo, asked), (small, question_of(0)), (small, question_of())):
        found = integrated_gradients(engine, question)
        assert found.errors.max() <= 0.01
        table, ids = mean_embedding(engine), question.ids
        embedded = engine.model.get_input_embeddings()(ids)
        torch.testing.assert_close(table, engine.model.get_input_embeddings().weight.double().mean(0))
        start = torch.where(question.special[:, None], embedded, table.float())
        with torch.no_grad():
            low = question.values(engine.model(inputs_embeds=start[None]).logits[0, -1])
        rise = values(engine, question, ids) - low
        assert ((found.scores.sum(-1) - rise).abs() <= 0.011 * rise.abs() + 1e-5).all()
        assert (found.scores[:, question.special] == 0).all()
        if not question.special[0]:  # the first token goes ahead, alone
            start[0] = embedded[0]
            with torch.no_grad():
                ahead = question.values(engine.model(inputs_embeds=start[None]).logits[0, -1])
            torch.testing.assert_close(found.scores[:, 0], ahead - low, rtol=1e-4, atol=1e-5)
    assert integrated_gradients(small, question_of(), most=8).steps == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_integrated_gradients_of_half_precision(demo, asked, dtype):
    """No two points of the way coincide: the scores are those of float32, up to rounding."""
    whole = integrated_gradients(demo, asked)
    half = DePass(copy.deepcopy(demo.model).to(dtype), demo.tokenizer, progress=False)
    found = integrated_gradients(half, asked)
    assert (found.scores - whole.scores).norm() <= 0.03 * whole.scores.norm()
    if dtype == torch.float16:
        assert found.errors.max() <= 0.01 and found.steps <= 2 * whole.steps


def test_integrated_gradients_of_captum(small):
    attr = pytest.importorskip("captum.attr")
    question = question_of(0)
    embedded = small.model.get_input_embeddings()(question.ids)[None].detach()
    start = torch.where(question.special[:, None], embedded, mean_embedding(small).float())

    def read(states):
        return question.values(small.model(inputs_embeds=states).logits[:, -1])

    method = attr.IntegratedGradients(read)
    each = [method.attribute(embedded, start, target=i, n_steps=64)[0].sum(-1) for i in range(3)]
    found = integrated_gradients(small, question).scores
    torch.testing.assert_close(found, torch.stack(each).detach().float(), rtol=0.02, atol=0.02)


# -- runs -----------------------------------------------------------------------------------------------------------


def test_leave_one_out_is_a_run_without_it(small):
    question, layer, head = question_of(), 2, 1
    found = scores_of(small, question, ["tokens", "heads"], only=[base.DELETED, base.REPLACED])
    whole, filler = values(small, question, question.ids), replacement_id(small)
    for i in range(N):
        shorter = torch.cat([question.ids[:i], question.ids[i + 1 :]])
        replaced = question.ids.clone()
        replaced[i] = filler
        for method, ids in ((base.DELETED, shorter), (base.REPLACED, replaced)):
            expected = whole - values(small, question, ids)
            torch.testing.assert_close(stacked(found["tokens"], method)[:, i], expected, rtol=1e-4, atol=1e-5)
    weight = small.adapter.module(layer, "o_proj").weight
    kept, width = weight.detach().clone(), small.adapter.attention(layer).head_dim
    with torch.no_grad():
        weight[:, head * width : (head + 1) * width] = 0
        expected = whole - values(small, question, question.ids)
        weight.copy_(kept)
    torch.testing.assert_close(stacked(found["heads"], base.DELETED)[:, layer, head], expected, rtol=1e-4, atol=1e-5)


def test_occlusion_of_captum(small):
    attr, question = pytest.importorskip("captum.attr"), question_of()
    found = scores_of(small, question, only=[base.REPLACED])["tokens"]
    occlusion = attr.FeatureAblation(lambda ids: small.model(ids).logits[:, -1, question.target])
    expected = occlusion.attribute(question.ids[None], baselines=replacement_id(small))[0]
    torch.testing.assert_close(found[base.REPLACED, "logit"], expected.detach().float(), rtol=1e-4, atol=1e-5)


def test_a_filler_is_one_token_and_none_that_is_special(demo):
    tokenizer = demo.tokenizer
    assert tokenizer.decode([replacement_id(demo)]) == " " and replacement_id(demo) not in tokenizer.all_special_ids
    spaced = DePass(demo.model, byte_level(pad_token=" "), progress=False)
    assert spaced.tokenizer.decode([replacement_id(spaced)]) == "_"
    with pytest.raises(ValueError, match="give DePass.model, tokenizer."):
        replacement_id(DePass(demo.model, progress=False))


# -- attention and norms --------------------------------------------------------------------------------------------


def test_rollout_by_hand():
    first, last = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.5, 0.0], [0.25, 0.25]])
    # ½ P + ½ I: [[1, 0], [.25, .75]], and [[.75, 0], [.125, .625]], of which the rows are [[1, 0], [1/6, 5/6]]
    expected = torch.tensor([[1.0, 0.0], [1 / 6 + 5 / 24, 5 / 8]])
    torch.testing.assert_close(rollout([first, last]), expected)


def test_attention_is_that_of_the_model(small):
    question = question_of()
    with torch.no_grad():
        attentions = small.model(question.ids[None], output_attentions=True).attentions
    found = scores_of(small, question, only=[base.ROLLOUT])["tokens"]
    assert found.keys() == {(base.ROLLOUT, "-")}
    torch.testing.assert_close(found[base.ROLLOUT, "-"], rollout([one[0].mean(0) for one in attentions])[-1])
    found = scores_of(small, question, only=[base.LAST_ATTENTION])["tokens"]
    torch.testing.assert_close(found[base.LAST_ATTENTION, "-"], attentions[-1][0].mean(0)[-1])


def test_norms_and_what_is_published_by_a_loop(small):
    """The published "heads" are blocks of the projection's output; the neurons' last position is read alone."""
    question, layer, adapter = question_of(), 1, small.adapter
    o_proj, down_proj = adapter.module(layer, "o_proj"), adapter.module(layer, "down_proj")
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = args[0], output
            output.retain_grad()
            args[0].retain_grad()

        return hook

    handles = [o_proj.register_forward_hook(keep("heads")), down_proj.register_forward_hook(keep("neurons"))]
    small.model(question.ids[None]).logits[0, -1, question.target].backward()
    small.model.zero_grad()
    for handle in handles:
        handle.remove()
    methods = [base.NORM, base.PUBLISHED_NORM, base.PUBLISHED_GRADIENT]
    found = scores_of(small, question, base.KINDS, only=methods)
    (z, written), (act, _) = seen["heads"], seen["neurons"]
    n_heads, width = adapter.attention(layer).n_heads, z.shape[-1] // adapter.attention(layer).n_heads
    size = written.shape[-1] // n_heads
    for head in range(n_heads):
        of_head = z[0, :, head * width : (head + 1) * width] @ o_proj.weight[:, head * width : (head + 1) * width].T
        block = slice(head * size, (head + 1) * size)
        own = {
            (base.NORM, "-"): of_head.norm(),
            (base.PUBLISHED_NORM, "-"): written[0, :, block].norm(),
            (base.PUBLISHED_GRADIENT, "logit"): (written.grad * written)[0, :, block].sum(),
        }
        for name, expected in own.items():
            torch.testing.assert_close(found["heads"][name][layer, head], expected.detach(), rtol=1e-4, atol=1e-6)
    for i in (0, 7):
        column = down_proj.weight[:, i].norm()
        own = {
            (base.NORM, "-"): act[0, :, i].norm() * column,
            (base.PUBLISHED_NORM, "-"): act[0, -1, i].abs() * column,
            (base.PUBLISHED_GRADIENT, "logit"): (act.grad * act)[0, -1, i],
        }
        for name, expected in own.items():
            torch.testing.assert_close(found["neurons"][name][layer, i], expected.detach(), rtol=1e-4, atol=1e-6)
    embedded = small.model.get_input_embeddings()(question.ids)
    torch.testing.assert_close(found["tokens"][base.NORM, "-"], embedded.norm(dim=-1).detach())


def test_heads_that_do_not_divide_the_hidden_size_have_no_blocks():
    engine = DePass(build_model("qwen3", num_attention_heads=5, num_key_value_heads=5, head_dim=8), progress=False)
    facts: dict = {}
    with pytest.raises(ValueError, match="the hidden size 32 is no multiple of 5 heads"):
        scores_of(engine, question_of(), ["heads"], only=[base.PUBLISHED_NORM], facts=facts)
