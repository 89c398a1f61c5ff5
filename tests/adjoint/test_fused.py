"""The sweep with kernels, interpreted, against the plain one: the same scores but for the order of sums."""

import pytest
import torch

pytest.importorskip("triton")

from depass_fast import DePass, Features, Neurons
from depass_fast.adjoint import stack
from depass_fast.adjoint.fused import FusedMaps
from depass_fast.adjoint.maps import LayerMaps
from depass_fast.options import Adjoint
from tests.support.adjoint import assert_close
from tests.support.components import Dictionary, custom
from tests.support.family_models import build_model
from tests.support.models import FAMILIES, build, random_ids

pytestmark = pytest.mark.filterwarnings("ignore::depass_fast.ApproximationWarning")


@pytest.fixture
def both(monkeypatch):
    """Returns results by plain maps and by fused ones."""

    def run(call):
        found = []
        for kind in (LayerMaps, FusedMaps):
            monkeypatch.setattr(stack, "maps_class", lambda device, dtype, kind=kind: kind)
            found.append(call())
        return found

    return run


KEPT = ("llama-gqa", "qwen2", "qwen3-biases")
EACH = [name if name in KEPT else pytest.param(name, marks=pytest.mark.thorough) for name in FAMILIES]


@pytest.mark.parametrize("name", EACH)
def test_the_kernels_change_nothing(name, both):
    dp, ids = build(name), random_ids(7, seed=3)
    kinds = [Neurons(layers="all"), *(custom(dp, ids, site=s) for s in ("resid_pre", "resid_mid"))]
    for kind in [*kinds, Features(1, Dictionary(size=12), "resid_post")]:
        method = Adjoint(refine=8, sample=8)
        plain, fused = both(lambda kind=kind, method=method: dp.attribute(ids, kind, [5, (2, 3)], method=method))
        for one, other in zip(*(list(r) if kind.is_layered else [r] for r in (plain, fused)), strict=True):
            assert_close(other.scores, one.scores, 2e-5)
            assert other.completeness_error <= 1e-5


@pytest.mark.parametrize("model", ["gpt_neox", "gemma2", "olmo2", "phi", "gpt2"])
def test_in_other_families(model, both):
    """Parallel layers, centred norms, norms behind, gates with constants."""
    dp, ids = DePass(build_model(model)), random_ids(6, seed=2)
    plain, fused = both(lambda: dp.attribute(ids, Neurons(layers="all"), 5, method=Adjoint(refine=8, sample=0)))
    for one, other in zip(plain, fused, strict=True):
        assert_close(other.scores, one.scores, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype, both):
    """The scores are as near to those of the same weights in float32 as the plain sweep's."""
    dp, ids = DePass(build_model("llama", initializer_range=0.05).to(dtype)), random_ids(6, seed=2)
    wide = DePass(build_model("llama", initializer_range=0.05).to(dtype).float())
    kind, method = Neurons(layers="all"), Adjoint(refine=8, sample=0)
    expected = wide.attribute(ids, kind, 5, method=method).scores
    found = both(lambda: dp.attribute(ids, kind, 5, method=method))
    errors = [(one.scores - expected).norm() / expected.norm() for one in found]
    assert errors[1] <= 1.1 * errors[0]


def test_positions_in_pieces(both):
    dp, ids = build("qwen2"), random_ids(7, seed=3)
    kind, method = Neurons(layers="all"), Adjoint(refine=8, sample=0)
    plain, fused = both(lambda: dp.attribute(ids, kind, 5, method=method, memory_budget=150_000))
    assert_close(fused.scores, plain.scores, 2e-5)
