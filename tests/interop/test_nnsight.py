"""nnsight's LanguageModel stands for the model inside."""

import pytest
import torch

from depass_fast import DePass, Heads, Tokens
from depass_fast.demo import load_demo
from tests.support.models import random_ids

nnsight = pytest.importorskip("nnsight")
IDS = random_ids(6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_results_are_those_of_the_model_inside():
    model, tokenizer = load_demo()
    oracle = [DePass(model, tokenizer).attribute(IDS, kind) for kind in (Tokens(), Heads(2))]
    wrapped = nnsight.LanguageModel(model, tokenizer=tokenizer)
    dp = DePass(wrapped)
    assert dp.model is model and dp.tokenizer is wrapped.tokenizer
    for expected, kind in zip(oracle, (Tokens(), Heads(2)), strict=True):
        result = dp.attribute(IDS, kind)
        assert torch.equal(result.scores, expected.scores) and result.labels == expected.labels
    with wrapped.trace(torch.tensor([IDS])):
        logits = wrapped.lm_head.output.save()
    assert float(oracle[0].target_logits) == pytest.approx(logits[0, -1].max().item(), rel=1e-5)
    assert DePass(wrapped, tokenizer).attribute("Nyria Morstam speaks", Tokens()).completeness_error < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_that_are_not_loaded(tmp_path):
    model, tokenizer = load_demo()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LanguageModel are not loaded yet; make it with dispatch=True"):
        DePass(nnsight.LanguageModel(str(tmp_path), tokenizer=tokenizer))
    dp = DePass(nnsight.LanguageModel(str(tmp_path), tokenizer=tokenizer, dispatch=True))
    assert dp.attribute("Nyria Morstam speaks", Tokens()).completeness_error < 1e-5
