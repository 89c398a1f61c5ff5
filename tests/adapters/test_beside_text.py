"""Models that see or hear, too: their text model is decomposed, if its own family is supported there."""

import pytest
import torch
import transformers
from transformers import AutoConfig

from depass_fast import DePass, Tokens
from depass_fast.adapters import adapt
from tests.support.family_models import VARIANTS, available, build_model
from tests.support.models import random_ids


@pytest.mark.skipif(not available("emu3"), reason="the installed transformers has no Emu 3")
def test_an_emu_3_with_its_vision():
    """`AutoModelForCausalLM` loads the text model alone, and this class all of it."""
    torch.manual_seed(0)
    words = {"<|extra_200|>": 60, "<image>": 61, "<|visual token 000000|>": 62, "<|visual token 000001|>": 63}
    config = AutoConfig.for_model("emu3", **VARIANTS["emu3"][1], vocabulary_map=words)
    model = transformers.Emu3ForConditionalGeneration(config).eval()
    dp, ids = DePass(model), torch.tensor(random_ids(7))
    trace = dp.trace(ids)
    with torch.no_grad():
        assert torch.allclose(dp.adapter.logits(trace.normed_final), model(ids[None]).logits[0], atol=1e-5)
    assert dp.attribute(trace, Tokens()).completeness_error <= 1e-5


@pytest.mark.skipif(not available("got_ocr2"), reason="the installed transformers has no GOT-OCR 2")
def test_a_text_model_of_another_family_is_refused():
    changes = VARIANTS["got_ocr2"][1]
    model = build_model("got_ocr2", **{**changes, "text_config": {**changes["text_config"], "model_type": "gemma"}})
    with pytest.raises(ValueError, match="its text model is a 'gemma', which is not supported in this place"):
        adapt(model)
