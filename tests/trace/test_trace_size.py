"""A trace's size is known beforehand, and grows with the number of positions, never with its square."""

import pytest
import torch

from depass_fast import DePass
from depass_fast.trace.size import trace_nbytes
from tests.support.family_models import VARIANTS, available, build_model, build_variant
from tests.support.models import random_ids

LENGTHS = (9, 1, 24)


@pytest.mark.once_a_family
@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_what_the_trace_holds(name):
    if not available(name):
        pytest.skip("this transformers does not know the family")
    model = build_variant(name)
    for dtype in (torch.float32, torch.bfloat16):
        try:
            trace = DePass(model.to(dtype)).trace([random_ids(n, seed=n) for n in LENGTHS])
        except RuntimeError as error:
            with pytest.raises(RuntimeError):  # the model itself does not run either
                model(torch.tensor([random_ids(9)]))
            pytest.skip(f"transformers itself: {error}")
        size = trace_nbytes(model.config, LENGTHS, dtype)
        if name == "longcat_flash":  # it depends on how many choices are experts that give back what they read
            assert trace.nbytes < size < 1.5 * trace.nbytes
        else:
            assert size == trace.nbytes


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_a_stream_that_is_wider_than_the_weights(name):
    if not available(name):
        pytest.skip("this transformers does not know the family")
    model = build_model(name, residual_in_fp32=True).bfloat16()
    assert trace_nbytes(model.config, LENGTHS, torch.bfloat16) == DePass(model).trace([[1] * n for n in LENGTHS]).nbytes


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 700}])
def test_long_prompts(changes):
    """8,192 tokens; with a window, blocks of queries see what they would see in one piece."""
    shape = {"num_hidden_layers": 1, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    model = build_model("mistral", **{"sliding_window": None, **shape, **changes})
    ids = torch.tensor(random_ids(8192))
    trace = DePass(model).trace(ids)
    assert trace.nbytes == trace_nbytes(model.config, [8192], torch.float32) < 8192**2
    with torch.no_grad():
        own = model(ids[None, -900:], position_ids=torch.arange(7292, 8192)[None]).logits[0, -1]
    if changes:  # what the last position sees is in the window
        assert torch.allclose(model.lm_head(trace.normed_final[-1]), own, atol=1e-4)


def test_the_config_says_it_all():
    """Nothing of the config is changed, a fork's own name is no hindrance, and what is asked for is what counts."""
    config = build_variant("llama: GQA").config
    before = config.to_dict()
    one = trace_nbytes(config, [1], torch.float32)
    assert trace_nbytes(config, [3, 0, 4], torch.float32) == 7 * one
    config.num_hidden_layers += 1
    assert trace_nbytes(config, [1], torch.float32) > one
    config.num_hidden_layers -= 1
    assert config.to_dict() == before


def test_no_causal_language_model():
    from transformers import CLIPTextConfig

    with pytest.raises(ValueError, match="config: CLIPTextConfig is not the config of a causal language model"):
        trace_nbytes(CLIPTextConfig(), [1], torch.float32)
