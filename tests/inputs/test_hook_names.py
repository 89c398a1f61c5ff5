"""TransformerLens' names stand for the same layers and sites as numbers do."""

import pytest
import torch

from depass_fast import Custom, Heads, Modules, Neurons, Subspaces, Tokens
from tests.support.models import build, random_ids

IDS = random_ids(6)
STATES = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(0))
BASES = [torch.eye(32)[:, :4]]


@pytest.mark.parametrize(
    ("named", "numbered"),
    [
        (Tokens("blocks.1.hook_resid_pre"), Tokens(1)),
        (Tokens("blocks.0.hook_resid_post"), Tokens(1)),
        (Tokens("blocks.0.hook_out"), Tokens(1)),
        (Heads("blocks.2.attn.hook_z"), Heads(2)),
        (Heads("blocks.2.attn.hook_result"), Heads(2)),
        (Neurons("blocks.1.mlp.hook_post"), Neurons(1)),
        (Modules("blocks.1.hook_attn_out"), Modules(1, "attention")),
        (Modules("blocks.1.hook_mlp_out", "mlp"), Modules(1, "mlp")),
        (Modules("blocks.1.hook_resid_post"), Modules(1)),
        (Subspaces("blocks.1.hook_resid_post", BASES), Subspaces(2, BASES)),
        (Custom("blocks.1.hook_resid_pre", STATES), Custom(1, STATES)),
        (Custom("blocks.1.hook_resid_mid", STATES), Custom(1, STATES, site="resid_mid")),
        (Custom("blocks.1.hook_resid_post", STATES), Custom(1, STATES, site="resid_post")),
    ],
)
def test_a_name_is_a_layer_and_a_site(named, numbered):
    dp = build("llama-gqa")
    assert named.layer == numbered.layer and named.site == numbered.site
    result, same = dp.attribute(IDS, named, 3), dp.attribute(IDS, numbered, 3)
    assert torch.equal(result.scores, same.scores) and result.labels == same.labels
    assert result.layer == numbered.layer


@pytest.mark.parametrize(("name", "end"), [("blocks.2.hook_resid_pre", 2), ("blocks.2.hook_resid_post", 3)])
def test_the_end_has_a_name_too(name, end):
    dp = build("llama-gqa")
    assert torch.equal(dp.decompose(IDS, Heads(1), end=name).rows, dp.decompose(IDS, Heads(1), end=end).rows)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (lambda: Heads("blocks.1.mlp.hook_post"), "layer: 'blocks.1.mlp.hook_post' does not fit here.*attn.hook_z"),
        (lambda: Tokens("blocks.1.hook_resid_mid"), r"give a layer's number, or 'blocks.<layer>.hook_resid_pre' or"),
        (lambda: Neurons("blocks.1.mlp.hook_pre"), "does not fit here; give a layer's number, or 'blocks.<layer>.mlp"),
        (lambda: Tokens("3"), "layer: '3' is no hook name"),
        (lambda: Tokens("blocks.-1.hook_resid_pre"), "is no hook name"),
        (lambda: Modules("blocks.1.hook_mlp_out", "attention"), "layer: 'hook_mlp_out' is not the output of which="),
        (lambda: Custom("blocks.1.hook_resid_mid", STATES, site="resid_pre"), "site: 'resid_pre' is not 'hook_resid"),
    ],
)
def test_names_that_do_not_fit(kind, message):
    with pytest.raises(ValueError, match=message):
        kind()


def test_layers_and_ends_that_the_model_lacks():
    dp = build("llama-gqa")
    with pytest.raises(ValueError, match="layer: 7 is out of range"):
        dp.attribute(IDS, Heads("blocks.7.attn.hook_z"))
    with pytest.raises(ValueError, match="end: 'blocks.1.attn.hook_z' does not fit here"):
        dp.decompose(IDS, Tokens(), end="blocks.1.attn.hook_z")
    with pytest.raises(ValueError, match="end: 'blocks.7.hook_resid_post' is out of range"):
        dp.decompose(IDS, Tokens(), end="blocks.7.hook_resid_post")
