"""A linear copy of a Hugging Face model, for gradient × component by autograd, without any of the library's formulas.

transformers runs its own forward pass. What is not linear in it is replaced, while the pass lasts, by a function of the
same value with the derivative of the frozen map (DESIGN.md section 8):

- attention: queries and keys are detached, so that P is a constant, its caps, sinks and windows with it;
- norms: the factor that a norm multiplies its (centred) input by is a constant;
- routers: their weights are detached;
- activations: their gradient, integrated by quadrature along the way from zero to their inputs;
- clamps, and what caps or scales the logits: the ratio of what comes out to what goes in is a constant.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Function = Callable[..., Any]
Model = Any  # a model of transformers, or a part: its projections are attributes that no type checker knows

NODES = 100  # along the way from zero: the curves of small random models need fewer than half of them for 1e-15


def frozen(value: Tensor, way: Tensor) -> Tensor:
    """Return ``value``, with the derivative of ``way``."""
    return value.detach() + (way - way.detach())


def by_ratio(x: Tensor, out: Tensor) -> Tensor:
    """Return ``out``, a function of x, as a constant times x, which is zero where x is."""
    return frozen(out, torch.where(x == 0, 0.0, out / x).detach() * x)


def path_gradient(function: Function, inputs: Sequence[Tensor], moving: Sequence[int]) -> list[Tensor]:
    """Return ∫₀¹ ∂function/∂x_i dt for the ``moving`` inputs i, which are t · X_i there; the others stay at X."""
    nodes, weights = (torch.tensor(a / 2) for a in np.polynomial.legendre.leggauss(NODES))
    t, weights = (a.view(-1, *[1] * inputs[0].ndim) for a in (nodes + 0.5, weights))
    at = [(t if i in moving else torch.ones_like(t)) * x for i, x in enumerate(inputs)]
    at = [x.detach().requires_grad_() for x in at]
    gradients = torch.autograd.grad(function(*at).sum(), [at[i] for i in moving])
    return [(weights * gradient).sum(0) for gradient in gradients]


def shared(rule: str, function: Function, *inputs: Tensor) -> Tensor:
    """Return function(*inputs), linearised: `shapley` moves all inputs at once, `half` takes the mean of each alone.

    Under `taylor` it is a constant times the first.
    """
    fixed, numbers = [x.detach() for x in inputs], range(len(inputs))
    if rule == "taylor":
        return by_ratio(inputs[0], function(*fixed))
    if rule == "shapley":
        factors = path_gradient(function, fixed, numbers)
    else:
        assert rule == "half"
        factors = [path_gradient(function, fixed, [i])[0] / len(inputs) for i in numbers]
    way = torch.stack([factor * x for factor, x in zip(factors, inputs, strict=True)]).sum(0)
    return frozen(function(*fixed), way)


class Linearised:
    """The linear forward pass of a model over N tokens under a rule: float64, eager attention, eval mode.

    logits (N, V) are the model's own, as functions of everything that ``scores`` asks for.
    """

    def __init__(self, model: Model, ids: Sequence[int], rule: str) -> None:
        assert model.config._attn_implementation == "eager" and not model.training
        self.ids, self.rule = ids, rule
        self._kept: dict[tuple[str, int, str], Tensor] = {}  # kind, layer, expert
        model.requires_grad_(False)
        with ExitStack() as stack, torch.enable_grad():
            self._replace(model, stack)
            logits = model(torch.tensor([ids]), use_cache=False).logits
            self.logits = by_ratio(self._raw_logits[..., : logits.shape[-1]], logits)[0]

    def scores(self, target: Function, position: int) -> tuple[Tensor, dict[tuple[str, int], dict[str, float]]]:
        """Return a target, a function of the logits (V,) at a position, and gradient × component: label -> score.

        The scores are by kind ("tokens", "heads", "neurons") and layer.
        """
        with torch.enable_grad():
            value = target(self.logits[position])
        kept = list(self._kept.values())
        gradients = torch.autograd.grad(value, kept, retain_graph=True, materialize_grads=True, allow_unused=True)
        found: dict[tuple[str, int], dict[str, float]] = {}
        for (kind, layer, expert), x, gradient in zip(self._kept, kept, gradients, strict=True):
            share, of_layer = (gradient * x).detach(), found.setdefault((kind, layer), {})
            if kind == "tokens":  # (1, N, D)
                of_layer |= {f"'{self.ids[n]}'@{n}": float(s) for n, s in enumerate(share[0].sum(-1))}
            elif kind == "heads":  # (1, N, H, d)
                of_layer |= {f"L{layer}H{h}": float(s) for h, s in enumerate(self._of_heads(layer, x, gradient))}
            else:  # (..., I)
                of_layer |= {f"L{layer}{expert}N{i}": float(s) for i, s in enumerate(share.flatten(0, -2).sum(0))}
        return value.detach(), found

    def _of_heads(self, layer: int, z: Tensor, gradient: Tensor) -> list[Tensor]:
        """Return the heads' scores: what they read of the residual stream, without the constants of their values."""
        resid = self._kept["tokens", layer, ""]
        with torch.enable_grad():
            parts = (gradient * z).sum((0, 1, 3))
        of_resid = [torch.autograd.grad(part, resid, retain_graph=True)[0] for part in parts]
        return [(gradient * resid.detach()).sum() for gradient in of_resid]

    def _keep(self, kind: str, layer: int, x: Tensor, expert: str = "") -> Tensor:
        assert (kind, layer, expert) not in self._kept
        self._kept[kind, layer, expert] = x
        return x

    def _replace(self, model: Model, stack: ExitStack) -> None:
        """Replace all that is not linear until the ``stack`` is closed."""

        def hook(handle: torch.utils.hooks.RemovableHandle) -> None:
            stack.callback(handle.remove)

        modeling = sys.modules[type(model).__module__]
        attention = self._attention(modeling.eager_attention_forward)
        stack.enter_context(patch.object(modeling, "eager_attention_forward", attention))
        hook(model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_()))
        hook(model.get_output_embeddings().register_forward_hook(self._keep_raw_logits))
        layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        for layer, block in enumerate(layers):
            hook(block.register_forward_pre_hook(self._keep_tokens(layer), with_kwargs=True))
        for path, module in model.named_modules():
            forward = self._replacement(path, module)
            if forward is not None:
                stack.enter_context(patch.object(module, "forward", forward))

    def _replacement(self, path: str, module: nn.Module) -> Function | None:
        """Return the linear forward of a module, None for one that is linear or has only parts that are not."""
        kind, number = type(module).__name__, re.search(r"\.(\d+)\.", path)
        layer = int(number[1]) if number else -1
        if "Norm" in kind:
            return self._norm(module)
        if hasattr(module, "gate_up_proj"):
            return self._experts(module, layer)
        if hasattr(module, "up_proj"):
            return self._gated(module, layer, "shared" if "shared_expert" in path else "")
        if "shared_expert_gate" in path:
            return lambda x: type(module).forward(module, x).detach()
        if re.search(r"mlp\.act$", path):
            return self._ungated(module, layer)
        return None

    # -- the parts --------------------------------------------------------------------------------------------------

    def _keep_raw_logits(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        self._raw_logits = out

    def _keep_tokens(self, layer: int) -> Function:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._keep("tokens", layer, args[0] if args else kwargs["hidden_states"])

        return before

    def _attention(self, eager: Function) -> Function:
        def attention(module, query, key, value, *args, **kwargs):
            z, p = eager(module, query.detach(), key.detach(), value, *args, **kwargs)
            return self._keep("heads", module.layer_idx, z), p

        return attention

    def _norm(self, norm: Model) -> Function:
        original, centring = norm.forward, isinstance(norm, nn.LayerNorm)

        def forward(x: Tensor) -> Tensor:
            x = x - x.mean(-1, keepdim=True) if centring else x  # which changes nothing for the norm itself
            bias = norm.bias if centring else 0.0
            return by_ratio(x, original(x.detach()) - bias) + bias

        return forward

    def _gated(self, mlp: Model, layer: int, expert: str) -> Function:
        def forward(x: Tensor) -> Tensor:
            act = shared(self.rule, lambda gate, up: mlp.act_fn(gate) * up, mlp.gate_proj(x), mlp.up_proj(x))
            return mlp.down_proj(self._keep("neurons", layer, act, expert))

        return forward

    def _ungated(self, activation: Model, layer: int) -> Function:
        original = activation.forward
        return lambda x: self._keep("neurons", layer, shared(self.rule, original, x))

    def _experts(self, experts: Model, layer: int) -> Function:
        """Each expert for all of its tokens. x (T, D), index (T, K) and weights (T, K) of the router."""
        expert_of = self._clamped_expert if hasattr(experts, "limit") else self._expert

        def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for expert in index.unique().tolist():
                token, slot = torch.where(index == expert)
                written = expert_of(experts, expert, x[token], layer)
                out = out.index_add(0, token, written * weights.detach()[token, slot, None])
            return out

        return forward

    def _expert(self, experts: Model, e: int, x: Tensor, layer: int) -> Tensor:
        gate, up = linear(x, experts.gate_up_proj[e]).chunk(2, -1)
        act = shared(self.rule, lambda gate, up: experts.act_fn(gate) * up, gate, up)
        return linear(self._keep("neurons", layer, act, f"E{e}"), experts.down_proj[e])

    def _clamped_expert(self, experts: Model, e: int, x: Tensor, layer: int) -> Tensor:
        """An expert of gpt-oss: interleaved, clamped, with biases and an up projection that is shifted by one."""
        gate_up = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        gate, up = gate_up[:, ::2], gate_up[:, 1::2]
        gate = by_ratio(gate, gate.clamp(max=experts.limit))
        up = by_ratio(up, up.clamp(-experts.limit, experts.limit)) + 1
        act = shared(self.rule, lambda gate, up: gate * torch.sigmoid(experts.alpha * gate) * up, gate, up)
        return self._keep("neurons", layer, act, f"E{e}") @ experts.down_proj[e] + experts.down_proj_bias[e]
