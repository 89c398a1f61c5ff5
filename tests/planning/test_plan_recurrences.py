"""Plans of models with recurrences: what is allocated in their forward passes and on their ways back, and time."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from depass_fast import DePass, Tokens
from depass_fast.adapters.recurrent import knows_recurrences
from depass_fast.planning.ledger import ledger_outlook
from depass_fast.planning.planner import make_plan
from depass_fast.planning.recurrences import mixer_sizes
from depass_fast.planning.shapes import ForwardPass, RunShape
from depass_fast.options import LINEAR
from tests.support.family_models import VARIANTS, build_model
from tests.support.models import build, random_ids

pytestmark = pytest.mark.skipif(not knows_recurrences(), reason="the installed transformers is too old")

LONG = 600  # positions, of which no matrix is made
WIDER = {
    "kimi_linear": {"linear_head_dim": 32, "linear_num_heads": 8},
    "mamba2": {"num_heads": 16, "head_dim": 16, "expand": 8, "n_groups": 1, "state_size": 16, "chunk_size": 128},
    "falcon_h1": {"mamba_n_heads": 16, "mamba_d_head": 8, "mamba_d_ssm": 128, "mamba_chunk_size": 128},
    "mamba": {"expand": 8, "state_size": 16},
    "qwen3_5_text": {"linear_num_value_heads": 8, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    "recurrent_gemma": {"lru_width": 256},
    "xlstm": {"chunk_size": 64, "v_dim_factor": 4.0, "ffn_proj_factor": 0.25},
}


class Held(TorchDispatchMode):
    """The bytes of storages that are made here: those that there are now, and the most that there were."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def wider(name: str) -> DePass:
    """A model whose recurrences outweigh the rest, for prompts of LONG tokens."""
    model_type, changes = VARIANTS[name]
    return DePass(build_model(model_type, **{**changes, **WIDER[name], "max_position_embeddings": LONG}))


@pytest.mark.parametrize("name", WIDER)
def test_forward_pass_and_way_back_hold_what_was_planned(name):
    dp, ids = wider(name), random_ids(LONG)
    with Held(dp.model) as forward:
        trace = dp.trace(ids)
    planned = ForwardPass.of(dp.adapter, [LONG], False, torch.device("cpu"))
    print(name, "forward", planned.peak / forward.peak, "beside", (planned.peak-planned.trace)/(forward.peak-planned.trace), forward.peak>>10, planned.trace>>10)
    with Held(dp.model) as back:
        dp.ledger(trace, 5, rule="half")
    shape = RunShape(dp.adapter, [LONG], Tokens(), dp.options.updated({"allocation": "half"}), method=LINEAR, is_ledger=True, traced=True)
    of_ledger = ledger_outlook(shape)
    print(name, "ledger", of_ledger.peak(of_ledger.default_workspace) / back.peak, back.peak>>10)
