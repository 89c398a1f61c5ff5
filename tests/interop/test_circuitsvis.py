"""Results as circuitsvis draws them."""

import json

import pytest

from depass_fast import Tokens
from tests.support.models import build, random_ids

tokens = pytest.importorskip("circuitsvis.tokens")


@pytest.mark.parametrize("target", [0, 1])
def test_coloured_tokens(target):
    result = build("qwen2").attribute(random_ids(6), Tokens(1), [3, 5])
    arguments = result.to_circuitsvis(target)
    assert arguments["values"] == result.scores[target][:6].tolist()
    html = str(tokens.colored_tokens(**arguments))
    assert "ColoredTokens" in html and json.dumps(arguments["tokens"]) in html
