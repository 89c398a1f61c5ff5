"""A head between the final norm and the unembedding (ModernBERT's decoder): one affine map per position, frozen."""

import pytest
import torch

from depass_fast import DePass, Heads, LogProb, Tokens
from depass_fast.compat import decomposed_state_manager
from depass_fast.evaluate.decoding import part_logits
from tests.support.family_models import available, build_variant
from tests.support.models import random_ids

IDS = random_ids(6)


@pytest.fixture
def dp():
    if not available("modernbert-decoder: biases"):
        pytest.skip("transformers without ModernBERT's decoder")
    return DePass(build_variant("modernbert-decoder: biases").double(), progress=False)


def test_a_direction_is_the_heads_own_map_with_ratio_and_scale_frozen(dp):
    head, hidden = dp.model.lm_head, dp.trace(IDS).normed_final[3]
    z = head.dense(hidden)
    ratio = head.act(z) / z
    scale = head.act(z).var(correction=0).add(head.norm.eps).rsqrt()

    def frozen(x):
        y = head.dense(x) * ratio
        return dp.model.decoder((y - y.mean()) * scale * head.norm.weight + head.norm.bias)[5]

    direction = torch.autograd.functional.jacobian(frozen, hidden.detach())
    vectors, constants = dp.adapter.token_directions(torch.tensor([5]), hidden[None], torch.float64)
    assert torch.allclose(vectors[0], direction, rtol=0, atol=1e-12)
    own = dp.model(torch.tensor([IDS])).logits[0, 3, 5].detach()
    assert float((vectors[0] @ hidden + constants[0]).detach()) == pytest.approx(float(own.detach()), rel=1e-11)


def test_log_probabilities_and_the_ledger_read_the_same(dp):
    log_p = dp.model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1).detach()
    entropy = float(-(log_p.exp() * log_p).sum())
    found = dp.attribute(IDS, Heads(1), LogProb(5))
    assert float(found.scores.sum()) == pytest.approx(float(log_p[5]) + entropy, rel=1e-10)
    exact = dp.attribute(IDS, Tokens(), 5, allocation="half", method="exact")
    book = dp.ledger(IDS, 5, rule="half")
    shares = {entry.label: entry.score for entry in book.top(99, kinds=["tokens"])}
    assert shares and all(
        shares[label] == pytest.approx(float(score), abs=1e-9)
        for label, score in zip(exact.labels, exact.scores, strict=True)
        if label in shares
    )


def test_components_over_the_whole_vocabulary_sum_to_the_models_logits(dp):
    hidden = dp.trace(IDS).normed_final[-1]
    found = part_logits(dp, dp.decompose(IDS, Heads(1)).dense()[-1], hidden)
    _, constants = dp.adapter.token_directions(torch.arange(64), hidden.expand(64, -1), torch.float64)
    own = dp.model(torch.tensor([IDS])).logits[0, -1]
    torch.testing.assert_close(found.sum(0).double() + constants, own.detach(), atol=1e-5, rtol=1e-5)


def test_hooks_in_the_head_are_noticed_and_the_published_interface_refuses(dp):
    handle = dp.model.lm_head.norm.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match="a forward hook on LayerNorm changes what follows the final norm"):
        dp.attribute(IDS, Tokens(), 5)
    handle.remove()
    with pytest.raises(ValueError, match="has a head there"):
        decomposed_state_manager(dp.model, None)
