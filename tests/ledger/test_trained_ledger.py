"""A ledger of a trained model, whose residual stream is large where it matters least, for a long prompt in float32."""

import copy

from depass_fast import DePass
from tests.support.trained import smollm2

STORY = "The old clock in the hall struck nine while the rain fell on the roof of the house by the sea. "
TARGET, WITHIN = 504, 1e-5


def test_many_tokens(pytestconfig):
    """It is complete, and `rest` of heads, a sum over the whole stream, is that of float64.

    One sum over positions and dimensions together, one term after the other, would miss both.
    """
    model, tokenizer = smollm2()
    length = 300 if pytestconfig.getoption("thorough") else 100
    ids = tokenizer(STORY * 14)["input_ids"][:length]
    assert len(ids) == length
    ledger = DePass(model, tokenizer).ledger(ids, TARGET)
    assert ledger.completeness_error <= WITHIN
    exact = DePass(copy.deepcopy(model).double(), tokenizer).ledger(ids, TARGET).heads()
    for found, other in zip(ledger.heads(), exact, strict=True):
        assert found.completeness_error <= WITHIN
        assert abs(found.score("rest") - other.score("rest")) <= WITHIN * float(other.scores.abs().sum()), found.layer
