"""Linear copies of models whose layers are more than softmax attention and an MLP (see :mod:`.linearised`).

Everything that is not a value is a constant. Where a projection gives queries, keys, gates, decays, step sizes or a
router's logits, its outputs lose their derivative as they leave it; of one that gives values, too, those channels keep
it. What is left of transformers' own code is linear, whatever its loops are. The rule is `taylor`: an activation is
what drives it times a constant, and so it is behind a convolution of values.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .linearised import Function, Linearised, Model, by_ratio, frozen, shared

# Patterns of the end of a module's path, behind which stands the name of the class of the module that it is in.
CONSTANT = (  # what gives no values
    r"(\.([abgkqr]_proj|in_proj_[abz]|linear_[qk]_adapter_list\.\d|receptance|gate|router|[ifo]gate_preact"
    r"|proj_up|experts\.input_linear|modality_router|input_mix_weight_up|block_inject_weight|shared_expert_gate)"
    r"|attention\.key|mlstm_layer\.[qk]) "
)
VALUES: dict[str, Callable[[Any, int], slice]] = {  # what gives values, too: these channels, of its owner and width
    r"in_proj_qkv ": lambda mixer, width: slice(2 * mixer.key_dim, width),
    r"in_proj (Mamba2|Zamba2Mamba|Bamba)Mixer": lambda mixer, width: slice(
        mixer.intermediate_size, 2 * mixer.intermediate_size
    ),
    r"in_proj (|Falcon|Jamba)MambaMixer": lambda mixer, width: slice(0, width // 2),
    r"in_proj ZambaMambaMixer": lambda mixer, width: slice(0, width, 2),
    r"kv_proj ": lambda attention, width: slice(width // 2, width),
    r"(mlp\.input_linear|gate_up_proj|gate_up_proj_adapter_list\.\d) ": lambda mlp, width: slice(0, width // 2),
}
HEADS = r"(o_proj|out_proj|attention\.output) "  # what reads what heads give
NEURONS = r"(proj_down|feed_forward\.value|per_layer_projection) |down_proj Zamba2MLP"  # what reads activations
EXPERTS = r"(mlp|experts)\.output_linear "  # JetMoE's, of both
ACTIVATIONS = r"((layers\.\d+|feed_forward|ffn)\.act_fn|mlp\.activation) "


def constant(x: Any) -> Any:
    """Return an output, or all of a tuple, without a derivative."""
    return tuple(map(constant, x)) if isinstance(x, tuple) else x.detach() if isinstance(x, Tensor) else x


def only(channels: slice, out: Tensor) -> Tensor:
    """Return an output of which only some channels have a derivative."""
    kept = torch.zeros(out.shape[-1], dtype=torch.bool)
    kept[channels] = True
    return torch.where(kept, out, out.detach())


def void(_: Any) -> None:
    """Return nothing, so that a hook changes nothing."""


class LinearisedMixers(Linearised):
    """The linear forward pass under `taylor`, as :class:`.linearised.Linearised` has it.

    ``n_heads`` gives the number of heads of a layer. Where a module is two layers (Zamba), both are counted.
    """

    def __init__(self, model: Model, ids: Sequence[int], n_heads: Callable[[int], int]) -> None:
        self._n_heads = n_heads
        self._biased: set[int] = set()  # layers whose heads give constants
        self._routed = getattr(model.config, "n_routed_experts", 0)
        self._e: Any = None
        super().__init__(model, ids, "taylor")

    def scores(self, target: Function, position: int) -> tuple[Tensor, dict[tuple[str, int], dict[str, float]]]:
        with torch.enable_grad():
            value = target(self.logits[position])
        kept = list(self._kept.values())
        gradients = torch.autograd.grad(value, kept, retain_graph=True, materialize_grads=True, allow_unused=True)
        of_key = dict(zip(self._kept, gradients, strict=True))
        found: dict[tuple[str, int], dict[str, float]] = {}
        for (kind, layer, of), x in self._kept.items():
            gradient, gate = of_key[kind, layer, of], (kind, layer, "embed")
            if gate in self._kept and of != "embed":  # what goes through the gate of the same layer is the gate's
                through = torch.autograd.grad(self._kept[gate], x, of_key[gate], retain_graph=True)[0]
                gradient = gradient - through
            share = gradient * (x - self._constants(layer, x) if kind == "heads" else x).detach()
            if kind == "tokens":  # (..., N, D)
                shares = share.movedim(-2, 0).flatten(1).sum(1)
                labels = [f"'{token}'@{n}" for n, token in enumerate(self.ids)]
            else:  # (..., channels)
                shares = share.flatten(0, -2).sum(0)
                labels = [f"L{layer}{of}N{i}" for i in range(len(shares))]
            if kind == "heads":  # of expert e of E: heads e, e + E, ...
                e, experts = map(int, (of or "0/1").split("/"))
                shares = shares.unflatten(0, (self._n_heads(layer) // experts, -1)).sum(1)
                labels = [f"L{layer}H{e + experts * h}" for h in range(len(shares))]
            of_layer = found.setdefault((kind, layer), {})
            for label, one in zip(labels, shares.tolist(), strict=True):
                of_layer[label] = of_layer.get(label, 0.0) + one
        return value.detach(), found

    def _constants(self, layer: int, z: Tensor) -> Tensor:
        """Return what is constant in what heads give: what is left without all that the layer reads."""
        if layer not in self._biased:
            return torch.zeros_like(z)
        roots = [x for (kind, at, of), x in self._kept.items() if (kind, at) == ("tokens", layer) and "later" not in of]
        probe = torch.zeros_like(z, requires_grad=True)
        with torch.enable_grad():
            ways = torch.autograd.grad(z, roots, probe, create_graph=True, materialize_grads=True, allow_unused=True)
            total = torch.stack([(way * root.detach()).sum() for way, root in zip(ways, roots, strict=True)]).sum()
        return z.detach() - torch.autograd.grad(total, probe, retain_graph=True)[0]

    # -- what is replaced -------------------------------------------------------------------------------------------

    def _replace(self, model: Model, stack: ExitStack) -> None:
        def hook(handle: torch.utils.hooks.RemovableHandle) -> None:
            stack.callback(handle.remove)

        self._replace_functions(sys.modules[type(model).__module__], stack)
        hook(model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_()))
        hook(model.get_output_embeddings().register_forward_hook(self._keep_raw_logits))
        named: dict[str, Any] = dict(model.named_modules())
        home = next(path for path in named if re.search(r"\.(layers|blocks)$", path))
        self._numbers, number = {}, 0  # of a module: its first layer and its last one
        for index, block in enumerate(named[home]):
            self._numbers[f"{home}.{index}"] = layer, last = number, number + hasattr(block, "mamba_decoder")
            if any("bias" in name and "dt" not in name for name, _ in block.named_parameters()):
                self._biased |= {layer, last}
            self._watch_tokens(block, layer, last, hook)
            number = last + 1
        for path, module in named.items():
            owner = named[path.rpartition(".")[0]]
            self._watch(f"{path} {type(owner).__name__}", module, owner, self._layer_of(path), hook)
            forward = self._replacement(path, module)
            if forward is not None:
                stack.enter_context(patch.object(module, "forward", forward))

    def _layer_of(self, path: str) -> int:
        """Return the number of the layer that a module is in, -1 outside of all."""
        home = re.match(r".*?\.(layers|blocks)\.\d+(?=\.)", path)
        return self._numbers[home[0]][".shared_" not in path] if home and home[0] in self._numbers else -1

    def _replace_functions(self, modeling: Any, stack: ExitStack) -> None:
        """Replace functions of the model's code, and some of torch's while the pass lasts."""

        def convolution(
            x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Any = None, **_: Any
        ) -> Tensor:
            padded = nn.functional.pad(x, (weight.shape[1] - 1, 0))
            out = nn.functional.conv1d(padded, weight[:, None], bias, groups=len(weight))
            return out if activation is None else by_ratio(out, ACT2FN[activation](out))

        def over_channels(function: Function) -> Function:  # AltUp's magnitudes, and thresholds of gates
            def of_each(*args: Any, **more: Any) -> Tensor:
                out = function(*args, **more)
                return out.detach() if more["dim"] == -1 else out

            return of_each

        def of_first(function: Function) -> Function:
            def with_constants(x: Tensor, *others: Any, **more: Any) -> Tensor:
                return function(x, *constant(others), **{key: constant(value) for key, value in more.items()})

            return with_constants

        replaced = {"causal_conv1d_fn": lambda _: convolution, "mamba_selective_scan": of_first}
        for name in replaced.keys() & vars(modeling).keys():
            stack.enter_context(patch.object(modeling, name, replaced[name](getattr(modeling, name))))
        for name in ("mean", "std"):
            stack.enter_context(patch.object(torch, name, over_channels(getattr(torch, name))))

    def _watch_tokens(self, block: Any, layer: int, last: int, hook: Function) -> None:
        """Keep what the components of a module's layers are parts of."""

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._keep("tokens", layer, args[0] if args else kwargs["hidden_states"])

        def with_first(module: nn.Module, args: tuple) -> tuple:
            x, e, *others = args
            e = e if layer else e.detach().requires_grad_()
            return self._keep("tokens", layer, x), self._first(layer, e), *others

        def mixer(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:  # behind a block
            name = "transformer_hidden_states"
            self._first(last, self._e)
            x, t = self._keep("tokens", last, args[0].clone()), self._keep("tokens", last, kwargs[name], "t")
            return (x, *args[1:]), {**kwargs, name: t}

        if "Zamba" in type(block).__name__:
            hook(block.register_forward_pre_hook(with_first))
            if last > layer:
                hook(block.mamba_decoder.register_forward_pre_hook(mixer, with_kwargs=True))
            return
        at = getattr(block, "ln1", None) or getattr(block, "attn_hyper_connection", None) or block
        hook(at.register_forward_pre_hook(before, with_kwargs=True))
        if getattr(block, "ple", None) is not None:  # embeddings that enter here, a token's own
            hook(block.ple.register_forward_hook(self._entering(layer)))

    def _first(self, layer: int, e: Tensor) -> Tensor:
        """Keep Zamba's first embedding as this layer and later ones have it."""
        self._e = self._keep("tokens", layer, (e if self._e is None else self._e).clone(), "e")
        return self._e

    def _entering(self, layer: int) -> Function:
        def behind(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            out = out.detach().requires_grad_()
            return self._keep("tokens", 0, out, f"later {layer}") if layer else out

        return behind

    def _watch(self, place: str, module: Any, owner: Any, layer: int, hook: Function) -> None:
        """Keep what a module of a layer is given, or make a constant of what it gives, if it is one of those."""

        def keep(kind: str, of: str = "") -> None:
            hook(module.register_forward_pre_hook(lambda module, args: void(self._keep(kind, layer, args[0], of))))

        def change(function: Function) -> None:
            hook(module.register_forward_hook(lambda module, args, out: function(out)))

        if re.search(CONSTANT, place):
            change(constant)
        for pattern, part in VALUES.items():
            if re.search(pattern, place):
                change(lambda out, part=part: only(part(owner, out.shape[-1]), out))
        if re.search(HEADS, place):
            keep("heads")
        if re.search(NEURONS, place):
            keep("neurons", "embed" if "per_layer" in place else "")
        if re.search(EXPERTS, place):
            kind = "heads" if ".experts." in place else "neurons"
            hook(module.register_forward_pre_hook(self._by_expert(kind, layer)))
        if "feed_forward.key " in place:  # relu(x)² is relu(x), a constant, times x
            change(lambda out: frozen(out, out / 2))

    def _by_expert(self, kind: str, layer: int) -> Function:
        def before(module: nn.Module, args: tuple) -> tuple:
            parts = args[0].split(args[1])
            for e, part in enumerate(parts):
                self._keep(kind, layer, part, f"{e}/{len(parts)}" if kind == "heads" else f"E{e}")
            return torch.cat(parts), args[1]

        return before

    def _replacement(self, path: str, module: Any) -> Function | None:
        kind, layer = type(module).__name__, self._layer_of(path)
        if "Norm" in kind and not isinstance(module, nn.Embedding):
            return self._norm(module)
        if re.search(ACTIVATIONS, f"{path} "):
            original = module.forward
            return lambda x: by_ratio(x, original(x))
        if kind == "InklingSharedExperts":
            return self._always(module, layer)
        if hasattr(module, "gate_up_proj") and kind != "Zamba2MLP":
            return self._experts(module, layer)
        if hasattr(module, "up_proj"):
            return self._gated(module, layer, "shared" if "shared_expert" in path else "")
        return None

    def _norm(self, norm: Any) -> Function:
        original, centring = norm.forward, "LayerNorm" in type(norm).__name__
        bias = getattr(norm, "bias", None)

        def forward(x: Tensor, *more: Tensor) -> Tensor:
            x = x - x.mean(-1, keepdim=True) if centring else x
            constant_part = 0.0 if bias is None else bias
            out = original(x.detach(), *constant(more)) - constant_part
            return by_ratio(x.reshape(out.shape), out) + constant_part

        return forward

    def _gated(self, mlp: Model, layer: int, expert: str) -> Function:
        cut = mlp._gaussian_topk if getattr(mlp, "activation_sparsity", 0.0) else lambda gate: gate

        def forward(x: Tensor) -> Tensor:
            act = shared(self.rule, lambda gate, up: mlp.act_fn(cut(gate)) * up, mlp.gate_proj(x), mlp.up_proj(x))
            return mlp.down_proj(self._keep("neurons", layer, act, expert)) * getattr(mlp, "global_scale", 1.0)

        return forward

    def _always(self, experts: Any, layer: int) -> Function:
        """Inkling's experts that all tokens are sent to: their numbers are behind those of the others."""

        def forward(x: Tensor, gammas: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for e, (gate, up, down) in enumerate(
                zip(experts.gate_proj, experts.up_proj, experts.down_proj, strict=True)
            ):
                act = shared(self.rule, lambda gate, up: experts.act_fn(gate) * up, x @ gate.T, x @ up.T)
                weight = gammas.detach().reshape(*x.shape[:-1], -1)[..., e, None]
                out = out + self._keep("neurons", layer, act, f"E{self._routed + e}") @ down.T * weight
            return out

        return forward


@contextmanager
def in_float64() -> Iterator[None]:
    """Have transformers compute in float64 what it computes in float32, in a model of float64."""

    def wide(dtype: Any) -> Any:
        return torch.float64 if dtype is torch.float32 else dtype

    def with_wide(function: Function) -> Function:
        return lambda *args, **more: function(*args, **{key: wide(value) for key, value in more.items()})

    to = Tensor.to

    def converted(x: Tensor, *args: Any, **more: Any) -> Tensor:
        return with_wide(to)(x, *map(wide, args), **more) if x.dtype == torch.float64 else to(x, *args, **more)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Tensor, "to", converted))
        stack.enter_context(patch.object(Tensor, "float", Tensor.double))
        for home, name in ((nn.functional, "softmax"), (torch, "zeros"), (torch, "zeros_like")):
            stack.enter_context(patch.object(home, name, with_wide(getattr(home, name))))
        yield
