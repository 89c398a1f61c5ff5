"""Results do not depend on PyTorch's default device, which a user may have set to anything, such as a GPU."""

import pytest
import torch

from depass_fast import Heads, Neurons, Tokens
from depass_fast.options import Adjoint
from tests.support.components import kinds
from tests.support.models import build, random_ids

WAYS = [
    *((kind, {"backend": "torch"}) for kind in kinds(7, 32).values()),
    *((kind, {"backend": "reference"}) for kind in (Tokens(), Neurons(0))),
    *((kind, {"backend": "triton"}) for kind in (Tokens(), Neurons(0))),
    *((kind, {"stream": True}) for kind in (Tokens(), Heads(0))),
    *((kind, {"verify": True}) for kind in (Tokens(),)),
    *((Neurons(layers=layers), {"method": Adjoint(refine=5, sample=8)}) for layers in ([0], "all")),
    (Heads(layers="all"), {}),
]


@pytest.mark.parametrize(("kind", "options"), WAYS, ids=lambda way: str(way)[:60])
def test_no_result_depends_on_the_default_device(kind, options):
    dp, ids = build("llama-gqa"), random_ids(7)
    expected = dp.attribute(ids, kind, 5, **options)
    try:
        torch.set_default_device("meta")
        found = dp.attribute(ids, kind, 5, **options)
    finally:
        torch.set_default_device(None)
    assert torch.equal(torch.as_tensor(found.scores, device="cpu"), expected.scores)
