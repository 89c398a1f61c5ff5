"""A call frees what it made when it ends: nothing waits for Python to look for circles of references."""

from __future__ import annotations

import gc

import pytest
import torch

from depass_fast import Adjoint, Heads, Modules, Neurons, Subspaces, Tokens

CALLS = {
    "tokens": lambda dp, ids: dp.attribute(ids, Tokens()),
    "tokens, a list": lambda dp, ids: dp.attribute([ids, ids[:4]], Tokens()),
    "heads of all layers": lambda dp, ids: dp.attribute(ids, Heads(layers="all")),
    "neurons": lambda dp, ids: dp.attribute(ids, Neurons(2)),
    "modules by reference": lambda dp, ids: dp.attribute(ids, Modules(1), backend="reference"),
    "subspaces": lambda dp, ids: dp.attribute(ids, Subspaces(1, bases=[torch.eye(128)[:, :3]])),
    "the adjoint sweep": lambda dp, ids: dp.attribute(ids, Neurons(layers="all"), method=Adjoint(refine=4)),
    "a linear rule": lambda dp, ids: dp.attribute(ids, Heads(layers="all"), allocation="shapley"),
    "a ledger": lambda dp, ids: dp.ledger(ids).heads(),
    "streaming": lambda dp, ids: dp.attribute(ids, Tokens(), stream=True),
    "verified": lambda dp, ids: dp.attribute(ids, Tokens(), verify=True),
    "decompose": lambda dp, ids: dp.decompose(ids, Tokens()),
    "focus": lambda dp, ids: dp.focus(ids, Tokens(), [1]),
    "attention": lambda dp, ids: dp.explain_attention(ids, Tokens(), layer=2, head=1),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_tensor_is_in_a_circle(demo, name):
    ids = [5, 6, 7, 8, 9, 10]
    CALLS[name](demo, ids)  # what is done once per model
    gc.collect()
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        CALLS[name](demo, ids)
        gc.collect()
        held = [type(one).__name__ for one in gc.garbage if isinstance(one, torch.Tensor) and one.numel() > 1]
        assert not held, {type(one).__name__ for one in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
