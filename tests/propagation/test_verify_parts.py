"""The reference in parts: what `verify=True` recomputes of a state is what the reference makes of the whole state."""

import numpy as np
import pytest
import torch

from depass_fast import Custom, DePass, Heads, Tokens
from depass_fast.backends import ReferenceBackend
from depass_fast.propagation import reference_parts
from depass_fast.propagation.reference_parts import reference_attention, reference_mlp, reference_readout
from tests.support.family_models import available, build_variant
from tests.support.models import FAMILIES, build, random_ids

pytestmark = pytest.mark.filterwarnings("error::depass_fast.VerificationWarning")
PROMPTS = [random_ids(9, seed=1), random_ids(5, seed=2)]


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 6_000, 1 << 30])
@pytest.mark.parametrize(
    "name",
    [
        "llama-biases",
        "mistral-window",
        "opt: stream norms, projected embedding",
        "olmo2: biases",
        "mpt: clamped, scaled",
    ],
)
def test_parts_are_the_reference_itself(name, size, monkeypatch):
    """Some components, some neurons at a time, a position alone: the same numbers as of the whole state."""
    if name not in FAMILIES and not available(name):
        pytest.skip("not in this version of transformers")
    dp = build(name, torch.float64) if name in FAMILIES else DePass(build_variant(name).double())
    try:
        trace = dp.trace(PROMPTS)
    except RuntimeError as error:  # MPT's own code runs no float64 in the oldest transformers
        pytest.skip(f"transformers itself: {error}")
    monkeypatch.setattr(reference_parts, "REFERENCE_BYTES", size)
    layer, record, run = dp.adapter.layer(1), trace.layers[1], dp.options.build(dp.adapter)

    def close(found, expected):
        return torch.allclose(found, expected, rtol=1e-11, atol=1e-12 * float(expected.abs().max()))

    for kind in (Tokens(1), Heads(0), Custom(1, torch.rand(9, 3, 32).double())):
        state = dp.start(trace if not isinstance(kind, Custom) else dp.trace(PROMPTS[0]), kind)
        here = record if not isinstance(kind, Custom) else dp.trace(PROMPTS[0]).layers[1]
        layout, segment = state.layout, len(state.layout.counts) - 2
        prompt, position = int(layout.prompt[segment]), int(layout.local[segment])
        rows = slice(layout.starts[segment], layout.starts[segment + 1])
        chosen = np.array([0, 2])
        part = reference_attention(state, layer.attention, here.attention, prompt, position, chosen)
        shared = reference_mlp(state, state, layer.mlp, here.mlp, run.allocation, segment)
        readout = reference_readout(state, None, trace.resid(1), torch.ones(2, 32).double(), segment)
        assert close(readout, state.rows[rows].sum(1, keepdim=True).expand(-1, 2))
        whole = state.take(np.arange(len(layout.counts)))
        assert close(part, ReferenceBackend().aggregate_ov(whole, layer.attention, here.attention).rows[rows][chosen])
        whole = state.take(np.arange(len(layout.counts)))
        assert close(shared, ReferenceBackend().allocate_mlp(whole, layer.mlp, here.mlp, run.allocation).rows[rows])


def test_with_little_memory_less_is_compared_and_in_float32(monkeypatch):
    dp = build("qwen2", torch.float64)
    usual = dp.attribute(PROMPTS, Heads(0), 7, verify=True)[0].verification
    monkeypatch.setattr(reference_parts, "REFERENCE_BYTES", 1)
    little = dp.attribute(PROMPTS, Heads(0), 7, verify=True)[0].verification
    assert little.passed and little.error < 1e-12 and 1 < little.compared < usual.compared
    monkeypatch.setattr(reference_parts, "available", lambda device: 0)
    single = dp.attribute(PROMPTS, Heads(0), 7, verify=True)[0].verification
    assert 1e-10 < single.error < 1e-5 < single.limit < 1e-3
