"""Labels that are nearly right, layers from the end, and one line without folders."""

from dataclasses import replace

import pytest

from depass_fast import DePass, Heads, Neurons, Tokens, masked_logits
from depass_fast.demo import load_demo


@pytest.fixture(scope="module")
def dp():
    return DePass(*load_demo(), progress=False)


def test_a_label_that_is_nearly_one_is_helped(dp):
    result = dp.attribute("Nyria Morstam speaks", Tokens())
    with pytest.raises(KeyError) as caught:
        result.score("speaks")
    assert str(caught.value) == "no component 'speaks'; did you mean \"' speaks'@4\"?"
    with pytest.raises(KeyError, match="labels run from"):
        result.score("nothing of it")


def test_layers_from_the_end(dp):
    result = dp.attribute("Nyria Morstam speaks", Heads(layers=[1, 3]))
    assert result[-1] is result[3] and result[-2] is result[1]
    for number in (-3, 2):
        with pytest.raises(KeyError, match=f"no layer {number}; this result holds 1, 3"):
            result[number]


def test_one_line_names_no_folder(dp):
    result = dp.attribute("Nyria Morstam speaks", Tokens())
    elsewhere = replace(result, provenance=replace(result.provenance, model="/home/somebody/models/tiny.gguf"))
    assert "tiny.gguf" in repr(elsewhere) and "somebody" not in repr(elsewhere)


@pytest.mark.parametrize("kind", [Heads, Neurons])
def test_a_layer_beside_layers_is_refused(kind):
    with pytest.raises(ValueError, match="layers: give either layers='all' or layer 3, not both"):
        kind(3, layers="all")


def test_the_rule_by_its_other_name(dp):
    with pytest.raises(TypeError, match=r"unknown option 'rule'.*The rule of attribute\(...\) is its allocation\."):
        dp.attribute("Nyria Morstam speaks", Tokens(), rule="shapley")


def test_how_a_linear_rule_is_told(dp):
    assert "exact, by one way back | shapley" in str(
        dp.attribute("Nyria Morstam speaks", Heads(layers="all"), allocation="shapley")
    )


def test_what_takes_components_away_is_public():
    from depass_fast.evaluate import interventions

    assert masked_logits is interventions.masked_logits
