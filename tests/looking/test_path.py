"""The average of attention's derivative from even attention to the model's."""

import pytest
import torch

from depass_fast.looking import path
from depass_fast.looking.path import path_average


def by_many_steps(logits, worth, steps=20_000):
    """The same average by the midpoint rule."""
    out = torch.zeros_like(worth)
    for tau in ((torch.arange(steps, dtype=torch.float64) + 0.5) / steps).tolist():
        p = (logits * tau).softmax(-1)
        out += p * (worth - (p * worth).sum(-1, keepdim=True)) / steps
    return out


def given(spread: float, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) * spread
    logits[0, 1, 4:] = -torch.inf
    logits[1, 0, 1:] = -torch.inf  # one key alone
    worth = torch.randn(2, 2, 3, 7, generator=generator, dtype=torch.float64)
    return logits.to(dtype), worth.to(dtype)


@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_it_is_the_integral(spread):
    logits, worth = given(spread)
    average, change = path_average(logits, worth)
    assert torch.allclose(average, by_many_steps(logits, worth), atol=1e-7)
    seen = torch.isfinite(logits)
    even = seen.double() / seen.sum(-1, keepdim=True)
    assert torch.allclose(change, ((logits.softmax(-1) - even) * worth).sum(-1), atol=1e-14)


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=["float32", "float64"])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 10.0, 100.0])
def test_it_is_complete(spread, dtype, allowed):
    logits, worth = given(spread, dtype)
    average, change = path_average(logits, worth)
    finite = logits.masked_fill(~torch.isfinite(logits), 0.0)
    size = (average * finite).abs().sum(-1) + change.abs() + torch.finfo(dtype).eps / allowed * 8  # what keys are worth
    assert (((average * finite).sum(-1) - change).abs() <= allowed * size).all()
    assert (average.sum(-1).abs() <= allowed * (average.abs().sum(-1) + 1e-30)).all()
    assert (average[:, ~torch.isfinite(logits)] == 0).all()


@pytest.mark.parametrize("middle, spread", [(1.0, 1e-7), (5.0, 1e-4), (30.0, 1e-6), (0.0, 1e-3)])
def test_where_logits_nearly_agree_rounding_is_not_blown_up(middle, spread):
    generator = torch.Generator().manual_seed(0)
    logits = (middle + spread * torch.randn(500, 1, 7, generator=generator)).float()
    worth = torch.randn(1, 500, 1, 7, generator=generator) * 3
    found, _ = path_average(logits, worth)
    wanted, _ = path_average(logits.double(), worth.double())
    assert (found - wanted).abs().max() < 1e-5


def test_keys_that_are_worth_the_same_take_few_nodes(monkeypatch):
    counts = []
    average = path._average
    monkeypatch.setattr(path, "_average", lambda *given: counts.append(given[2]) or average(*given))
    path_average(torch.randn(4, 3, 7), torch.full((1, 4, 3, 7), 2.7))
    assert counts == [12]


@pytest.mark.parametrize("offset, spread", [(0.0, 3.0), (0.0, 30.0), (0.0, 100.0), (1000.0, 0.1), (300.0, 5.0)])
def test_float32_is_near_to_float64(offset, spread):
    """More nodes are needed if logits differ much, and a common offset must not round."""
    generator = torch.Generator().manual_seed(0)
    logits = (offset + spread * torch.randn(3, 50, 9, generator=generator)).float()
    worth = torch.randn(1, 3, 50, 9, generator=generator)
    found, change = path_average(logits, worth)
    wanted, wanted_change = path_average(logits.double(), worth.double())
    assert (found - wanted).abs().max() < 1e-6 and (change - wanted_change).abs().max() < 1e-5


def test_a_constant_in_all_logits_changes_nothing():
    logits, worth = given(2.0)
    one, _ = path_average(logits, worth)
    other, _ = path_average(logits + 50.0, worth)
    assert torch.allclose(one, other, atol=1e-9)
