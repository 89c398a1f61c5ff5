"""A way back stays finite whatever the model or the prompt."""

import math

import pytest

from depass_fast import Neurons
from tests.support.components import custom
from tests.support.extreme import CHANGES, extreme
from tests.support.models import random_ids


@pytest.mark.parametrize("rule", ["taylor", "half", "shapley"])
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_ever_nan_or_inf(change, rule):
    dp, _ = extreme(change)
    for length in (1, 6):
        ids = random_ids(length, seed=10)
        for kind in (Neurons(layers="all"), custom(dp, ids, layer=0, scale=10.0)):
            found = dp.attribute(ids, kind, [5, (2, 3)], allocation=rule, method="adjoint")
            for one in found if kind.is_layered else [found]:
                assert one.scores.isfinite().all() and math.isfinite(one.completeness_error)
