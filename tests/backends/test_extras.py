"""Attention for `rest` and `bias` alone, beside components that are carried as products, and sums in a wider dtype."""

import pytest
import torch

from depass_fast import Heads, Tokens
from depass_fast.backends import StreamBackend
from depass_fast.backends.torch.backend import TorchBackend
from depass_fast.backends.triton import kernelless
from depass_fast.backends.triton.backend import TritonBackend
from depass_fast.runtime.products import accumulate
from depass_fast.state.state import ComponentState
from tests.support.models import build, random_ids
from tests.support.states import close

MADE = {
    "torch": lambda budget: TorchBackend(memory_budget=budget),
    "triton": lambda budget: TritonBackend(memory_budget=budget),
    "triton, left to torch": lambda budget: TritonBackend(memory_budget=budget),
    "stream": lambda budget: StreamBackend(torch.device("cpu"), memory_budget=budget),
}
KINDS = {"rest": ("llama-gqa", Heads(0)), "bias": ("llama-biases", Tokens(1)), "both": ("llama-biases", Heads(0))}


@pytest.mark.parametrize("budget", [None, 3_000])
@pytest.mark.parametrize("extras", KINDS)
@pytest.mark.parametrize("backend", MADE)
@torch.no_grad()
def test_only_the_extras_change_where_only_they_are_asked_for(backend, extras, budget, monkeypatch):
    if "left" in backend:
        monkeypatch.setattr(kernelless, "WIDEST_HEAD", 1)
    name, kind = KINDS[extras]
    dp = build(name)
    trace = dp.trace([random_ids(6), random_ids(4)])
    start = dp.start(trace, kind)
    layer, record = dp.adapter.layer(start.layer).attention, trace.layers[start.layer].attention

    def after(only: bool) -> torch.Tensor:
        state = ComponentState(start.rows.clone(), start.layout, start.layer)
        return MADE[backend](budget)._aggregate_everywhere(state, layer, record, extras_only=only).rows

    member = torch.arange(len(start.rows)) - torch.from_numpy(start.layout.starts[start.layout.row_segments()])
    is_extra = member < len(start.layout.components[0].extras)
    found, everyone = after(True), after(False)
    assert is_extra.any() and close(found[is_extra], everyone[is_extra])
    assert torch.equal(found[~is_extra], start.rows[~is_extra])
    assert not torch.equal(everyone[~is_extra], start.rows[~is_extra])


@pytest.mark.parametrize("alpha", [1.0, 2.0**-7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision_are_added_up_in_float32(dtype, alpha):
    """Sums beyond float16's range, over more columns than are widened at a time."""
    generator = torch.Generator().manual_seed(0)
    a = (torch.randn(5, 1_300, generator=generator) * 200).to(dtype)
    b = (torch.randn(1_300, 7, generator=generator) * 200).to(dtype)
    out = torch.randn(5, 7, generator=generator)
    product = a.double() @ b.double()
    exact = out.double() + alpha * product
    accumulate(out, a, b, alpha)
    assert product.abs().max() > 65504
    assert close(out.double(), exact, 5e-3 if dtype == torch.bfloat16 else 2e-6)
