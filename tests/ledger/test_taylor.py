"""The published linear rule by a way back, against exact propagation."""

import pytest

from depass_fast import DePass, Features, Neurons
from tests.support.adjoint import assert_close
from tests.support.components import Dictionary, custom
from tests.support.family_models import build_model
from tests.support.models import FAMILIES, build, random_ids

_EXPERTS = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 8}


@pytest.mark.parametrize("name", FAMILIES)
def test_taylor_is_exact(name):
    dp, ids = build(name), random_ids(7, seed=3)
    kinds = [Neurons(layers="all"), *(custom(dp, ids, site=s) for s in ("resid_pre", "resid_mid", "resid_post"))]
    for kind in [*kinds, Features(1, Dictionary(size=12), "resid_post")]:
        for target in (5, [None, (9, 3)]):
            exact = dp.attribute(ids, kind, target, allocation="taylor", method="exact")
            found = dp.attribute(ids, kind, target, allocation="taylor", method="adjoint")
            assert found.method == "adjoint" and found.labels == exact.labels and found.estimate is None
            for one, other in zip(*(list(r) if kind.is_layered else [r] for r in (found, exact)), strict=True):
                assert one.labels == other.labels
                assert_close(one.scores, other.scores, 1e-5)
                assert one.completeness_error <= 1e-5


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "gemma2", "qwen2_moe", "opt", "mpt", "olmo2", "phi"])
def test_other_families(model_type):
    """Norms before and behind a branch, parallel branches, plain MLPs, experts: exact and complete as in a Llama."""
    dp = DePass(build_model(model_type, **(_EXPERTS if model_type == "qwen2_moe" else {})))
    trace = dp.trace(random_ids(6, seed=2))
    exact = dp.attribute(trace, Neurons(layers="all"), 5, method="exact", allocation="taylor")
    found = dp.attribute(trace, Neurons(layers="all"), 5, method="adjoint", allocation="taylor")
    for one, other in zip(found, exact, strict=True):
        assert one.labels == other.labels
        assert_close(one.scores, other.scores, 1e-4)
    assert found.completeness_error <= 1e-4
