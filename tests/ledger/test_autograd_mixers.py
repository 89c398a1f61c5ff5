"""A ledger is gradient × component of a linearised model, where layers are more than attention and an MLP."""

from typing import Any

import pytest
import torch

from depass_fast import DePass
from tests.support.family_models import available, build_variant
from tests.support.ledgers import off, scores_by_label
from tests.support.linearised_mixers import LinearisedMixers, in_float64
from tests.support.models import random_ids

IDS, INNER, TARGET = random_ids(8), 4, 5
WITHIN = 1e-12  # relative to Σ|scores|
LAYERS = {  # of the kinds that a layer has, tokens, heads and neurons in this order, by layer
    "qwen3_5_text": "thn thn thn",  # a delta rule, and gated attention
    "mamba2: biases": "th th th",
    "mamba: biases": "th th th",
    "gemma3n_text": "thn thn thn thn thn",  # AltUp, LAuReL, gates cut off, gates of embeddings, shared values
    "zamba": "thn th th thn th",  # a shared block before Mamba-1
    "zamba2: adapters of attention, biases": "th thn th thn th",
    "jetmoe": "thn thn thn",  # a router chooses heads
    "xlstm: biases": "thn thn thn",
    "rwkv": "thn thn thn",  # branches that read two positions
    "qwen4_exp_text": "thn thn thn",  # gated streams, embeddings that enter later
    "inkling_text": "thn thn thn",  # convolutions behind branches, logits with a bias by distance
}
THOROUGH = {  # the same parts in other places
    "bamba: MHA, biases": "thn thn thn",
    "falcon_mamba": "th th th",
    "jamba: biases, dense": "thn thn thn",
    "olmo_hybrid": "thn thn thn",
    "zamba2": "thn th th thn th",
    "jetmoe: MQA, three of five": "thn thn thn",
    "inkling_text: two dense layers": "thn thn thn",
}
EVERY = {**LAYERS, **THOROUGH}


@pytest.mark.parametrize("name", [*LAYERS, *(pytest.param(name, marks=pytest.mark.thorough) for name in THOROUGH)])
def test_a_ledger_of_mixers_is_gradient_times_component(name):
    if not available(name):
        pytest.skip("the installed transformers does not have it")
    model: Any = build_variant(name, implementation="eager").double()
    model.config._experts_implementation = "eager"  # which takes float64
    for module in model.modules():
        if hasattr(module, "chunk_size"):  # a prompt is filled up to whole chunks
            module.chunk_size = 4
    with in_float64():
        dp = DePass(model)
        own = model(torch.tensor([IDS])).logits[0].detach()
        linearised = LinearisedMixers(model, IDS, lambda layer: dp.adapter.attention(layer).n_heads)
        assert torch.allclose(linearised.logits, own, rtol=0, atol=1e-12 * float(own.abs().max()))
        ledger = dp.ledger(IDS, TARGET, rule="taylor", position=[-1, INNER])
    for read, position in enumerate([-1, INNER]):
        value, expected = linearised.scores(lambda logits: logits[TARGET], position)
        kinds = [f"{kind[0]}{layer}" for kind, layer in expected]
        assert sorted(kinds) == sorted(f"{k}{i}" for i, layer in enumerate(EVERY[name].split()) for k in layer)
        for (kind, layer), scores in expected.items():
            found = scores_by_label(getattr(ledger, kind)(layer)[read], 0)
            assert off(found, scores, float(value)) <= WITHIN, (kind, layer, position)
