"""Llama 3.2 Vision: a Llama on text, without the layers that only images wake; images are refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from bench.core.models import randomised
from depass_fast import DePass, Heads, Neurons, Tokens
from tests.support.family_models import VARIANTS, available
from tests.support.models import random_ids

pytestmark = pytest.mark.skipif(not available("mllama"), reason="transformers 4 has other code for it")
IDS = random_ids(6)


@pytest.fixture(scope="module")
def seeing() -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model("mllama", **copy.deepcopy(VARIANTS["mllama"][1]))
    return randomised(AutoModelForImageTextToText.from_config(config).eval()).double()


def test_the_model_with_its_vision_tower_is_decomposed_on_text(seeing):
    dp = DePass(seeing, progress=False)
    with torch.no_grad():
        own = seeing(torch.tensor([IDS]), use_cache=False).logits[0, -1]
    assert dp.adapter.n_layers == 3 and dp.adapter.home(1) == 2  # of five, two are for images
    for kind in (Tokens(), Heads(1), Neurons(layers="all")):
        result = dp.attribute(IDS, kind, 7)
        assert result.completeness_error <= 1e-12
        assert result.target_logits.flatten()[0].item() == pytest.approx(own[7].item(), abs=1e-6)


def test_images_are_refused(seeing):
    image = {"input_ids": torch.tensor([IDS]), "pixel_values": torch.zeros(1, 1, 1, 3, 28, 28)}
    with pytest.raises(ValueError, match="pixel_values is an input that a decomposition would leave out"):
        DePass(seeing).attribute(image, Tokens())
