"""Refusals name what a model has beyond softmax attention and then an MLP."""

from __future__ import annotations

import re

import pytest

from depass_fast import DePass, Neurons, Tokens
from depass_fast.compat import decomposed_state_manager
from depass_fast.evaluate.methods.base import NotPossibleError
from depass_fast.evaluate.methods.relevance import copied
from depass_fast.trace.held import check_holdable
from tests.support.family_models import available, build_variant

IDS = [5, 11, 3]
BESIDE = {
    "bitnet": "norms in front of the projection of heads",
    "mamba2": "recurrences, layers without an MLP",
    "doge": "factors of the stream",
    "diffllama": "attention that is no single softmax, norms in front of the projection of heads",
    "afmoe": "gates in front of the projection of heads",
    "longcat_flash": "experts ahead of their layer",
    "jetmoe": "heads that a router chooses",
}


@pytest.mark.parametrize("name", BESIDE)
def test_refusals_name_what_there_is(name):
    if not available(name):
        pytest.skip(f"the installed transformers does not have {name}")
    dp = DePass(build_variant(name), progress=False)
    trace = dp.trace(IDS)
    does_not_know = re.escape(f"all that this one has: {BESIDE[name]}.")
    layer = next(layer for layer in range(dp.adapter.n_layers) if dp.adapter.has_attention(layer))
    asks = {
        "attention's own book": lambda: dp.explain_attention(trace, Tokens(), layer, 0),
        "the published interface": lambda: decomposed_state_manager(dp.model, None),
        "held attention": lambda: check_holdable(dp.adapter),
        "method: 'adjoint'": lambda: dp.attribute(trace, Neurons(layers="all"), method="adjoint"),
    }
    for what, ask in list(asks.items())[: 3 if name in ("jetmoe", "mamba2") else 4]:
        with pytest.raises(ValueError, match=f"{what}.*{does_not_know}"):
            ask()
    if dp.adapter.observed is None:
        with pytest.raises(NotPossibleError, match=f"the model has {BESIDE[name]}"), copied(dp, trace, "half", 1.0):
            pass


def test_plain_models_have_nothing_beyond(demo):
    assert demo.adapter.beyond_plain == [] and demo.adapter.is_uniform and demo.adapter.mixes_plainly
