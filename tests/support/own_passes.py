"""Shared by the tests of our own forward pass: a model that it was compared with, and whose pass a trace is."""

import torch

from depass_fast import DePass
from depass_fast.adapters import Adapter
from depass_fast.trace import own_pass
from tests.support.family_models import build_model
from tests.support.models import FAMILIES, random_ids

PROMPTS = [torch.tensor(random_ids(n, seed=n)) for n in (11, 1, 6)]


def fresh(name="llama-gqa", dtype=torch.float32):
    """An engine that has traced a prompt, so that our pass was compared with the model's own."""
    model_type, changes = FAMILIES[name]
    dp = DePass(build_model(model_type, **changes).to(dtype))
    dp.trace(PROMPTS)
    return dp


def by_the_model(dp, prompts, monkeypatch):
    """The trace by the model's own code and hooks."""
    with monkeypatch.context() as patch:
        patch.setattr(own_pass, "admitted", lambda *about: None)
        return dp.trace(prompts)


def is_used(dp, monkeypatch, prompts=PROMPTS):
    """True if a trace is taken without the model's own code."""
    called = []
    with monkeypatch.context() as patch:
        run = Adapter.run
        patch.setattr(Adapter, "run", lambda *given, **named: (called.append(1), run(*given, **named)))
        dp.trace(prompts)
    return not called


def same_bits(one, other):
    tensors = [[*(x for layer in trace.layers for x in layer.tensors()), trace.normed_final] for trace in (one, other)]
    masks = [[(x.attention.scale, x.attention.window, x.attention.softcap) for x in t.layers] for t in (one, other)]
    return masks[0] == masks[1] and all(map(torch.equal, *tensors))
