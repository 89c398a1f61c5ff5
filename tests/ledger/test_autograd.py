"""A ledger is the gradient of a linearised model, by autograd through a Llama of the test's own."""

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from tests.support.models import build, random_ids

IDS, TARGET = random_ids(8), 5
WITHIN = 1e-6  # transformers runs norms and rotations of a float64 model in float32


def mean_of_silu(x):
    """∫₀¹ silu(t · x) dt by 60 nodes."""
    nodes, weights = (torch.tensor(a / 2) for a in np.polynomial.legendre.leggauss(60))
    return (weights * silu((nodes + 0.5) * x[..., None])).sum(-1)


def coefficients(rule, gate, up):
    """Return the factors of a component's gate and of its up, in an MLP that computes silu(gate) · up."""
    if rule == "half":
        return 0.5 * torch.sigmoid(gate) * up, 0.5 * silu(gate)
    mean = mean_of_silu(gate)
    return (silu(gate) - mean) / gate * up, mean


def rms_scale(norm, x):
    return norm.weight * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt().detach()


def rotated(x, theta):
    """Rotary embedding of (N, H, d)."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half).to(x)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


def linearised(model, ids, rule):
    """Return the logit of TARGET and everything on the way to it, with norm scales, P and coefficients frozen."""
    n_heads, n_kv, seen = model.config.num_attention_heads, model.config.num_key_value_heads, {}

    def keep(name, x):
        seen[name] = x
        x.retain_grad()
        return x

    x = model.model.embed_tokens.weight[ids].detach().requires_grad_()
    for index, layer in enumerate(model.model.layers):
        x = keep(("tokens", index), x * 1.0)
        h, attention, mlp = x * rms_scale(layer.input_layernorm, x), layer.self_attn, layer.mlp
        q, k = (rotated((h @ w.weight.T).unflatten(-1, (n, -1)), 10000.0).detach()
                for w, n in ((attention.q_proj, n_heads), (attention.k_proj, n_kv)))  # fmt: skip
        k, v = (one.repeat_interleave(n_heads // n_kv, 1)
                for one in (k, (h @ attention.v_proj.weight.T).unflatten(-1, (n_kv, -1))))  # fmt: skip
        logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        p = logits.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf).softmax(-1)
        z = keep(("heads", index), torch.einsum("hqk,khd->qhd", p, v))
        x = x + z.flatten(1) @ attention.o_proj.weight.T
        h = x * rms_scale(layer.post_attention_layernorm, x)
        gate, up = h @ mlp.gate_proj.weight.T, h @ mlp.up_proj.weight.T
        of_gate, of_up = coefficients(rule, gate.detach(), up.detach())
        act = keep(("neurons", index), of_gate * gate + of_up * up)
        x = x + act @ mlp.down_proj.weight.T
    return ((x * rms_scale(model.model.norm, x)) @ model.lm_head.weight.T)[-1, TARGET], seen


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa"])
@pytest.mark.parametrize("rule", ["half", "shapley"])
def test_a_ledger_is_gradient_times_component_of_a_linearised_model(name, rule):
    dp = build(name, torch.float64)
    ledger = dp.ledger(IDS, TARGET, rule=rule)
    with torch.enable_grad():
        logit, seen = linearised(dp.model, IDS, rule)
        logit.backward()
    assert torch.isclose(logit.detach(), ledger.tokens().target_logits, rtol=0, atol=WITHIN)
    scores = {name: (x.grad * x).detach() for name, x in seen.items()}
    for layer in range(3):
        of_positions = {"tokens": scores["tokens", layer].sum(-1), "heads": scores["heads", layer].sum((0, 2))}
        of_positions["neurons"] = scores["neurons", layer].sum(0)
        for kind, expected in of_positions.items():
            found = getattr(ledger, kind)(layer).scores[: len(expected)]
            assert (found - expected).abs().max() <= WITHIN * expected.abs().max(), (kind, layer)
