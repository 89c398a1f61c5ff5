"""A model seen through its family's declaration: the weights of every layer, and the modules that a trace hooks."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import experts
from .dense import dense_mlp, unusable_part
from .experts import ExpertAssignment, RoutedExpert
from .family import Experts, Family, Observed, Path
from .paths import below, below_or_none, name_of
from .stored import Stacked, stored_bias, stored_device, stored_shape, stored_weight
from .tuned import inside
from .weights import Attention, Latent, Layer, Linear, Mlp, Norm

_NORMS = ("_norm", "_output_norm", "_stream_norm")  # of a branch
_BRANCH_NORMS = [f"{branch}{kind}" for branch in ("attention", "mlp") for kind in _NORMS]

# the parts that every layer has, except that a mixture of experts has no projections of an MLP
AlwaysThere = Literal["attention", "v_proj", "o_proj", "mlp", "gate_proj", "down_proj"]


@dataclass(frozen=True)
class Adapter:
    """A model and where its family keeps its parts. Nothing outside this package reads the declaration itself."""

    model: nn.Module
    family: Family

    # -- the model ----------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The config that attention looks at: the text model's, where the model also sees."""
        return self.decoder.config

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def blocks(self) -> nn.ModuleList:
        return self._below_model(self.family.layers)

    @property
    def decoder(self) -> nn.Module:
        """The model without its unembedding."""
        return inside(self.model.base_model) if self.family.decoder is None else self._below_model(self.family.decoder)

    @property
    def embedding(self) -> nn.Embedding:
        return self._below_model(self.family.embedding)

    @property
    def final_norm_module(self) -> nn.Module | None:
        return None if self.family.final_norm is None else self._below_model(self.family.final_norm)

    @property
    def context_length(self) -> int | None:
        """The most positions that the model can have; None where nothing limits them (BLOOM's ALiBi)."""
        names = ("max_position_embeddings", "max_seq_len")
        return next((getattr(self.config, name) for name in names if hasattr(self.config, name)), None)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the embedding; `device_map` may put later layers elsewhere."""
        return self.embedding.weight.device

    @property
    def is_parallel(self) -> bool:
        """True if the MLP of a layer reads the same residual stream as its attention."""
        return self.family.parallel

    # -- its attention ------------------------------------------------------------------------------------------

    @property
    def has_alibi(self) -> bool:
        """True if the logits of keys are raised by their distance (ALiBi)."""
        return self.family.alibi

    @property
    def has_sinks(self) -> bool:
        """True if every query has, beside the keys' logits, a logit of nothing (gpt-oss)."""
        return self.family.sinks

    def window(self, index: int, announced: int | None, implementation: str | None) -> int | None:
        """The sliding window of layer ``index`` in the model's own mask, given what its attention call announces.

        Before transformers made masks per layer, eager and sdpa masks applied the configured window to every layer,
        whatever the layer announced. Flash attention has no mask and always applied the window that was announced.
        """
        flash = "flash" in (implementation or "eager")
        one_mask_for_all = hasattr(self.decoder, "_update_causal_mask") and not self.family.layer_windows
        if one_mask_for_all and not flash:
            return getattr(self.config, "sliding_window", None)
        if announced is not None or (flash and self.observed is None):
            return announced
        window = self.family.window
        return window[index] if isinstance(window, tuple) else window

    def scale(self, attention: nn.Module, implementation: str | None) -> float | None:
        """The factor of an attention module's logits where its call announces none; None: the usual d^-0.5."""
        own = self.family.eager_scale
        return own(attention) if own is not None and implementation == "eager" else None

    @property
    def observed(self) -> Observed | None:
        """The way to observe attention that this version of transformers does not let be replaced; None if it does."""
        attention = type(self.module(0, "attention"))
        homes = [sys.modules[base.__module__] for base in attention.__mro__]
        pluggable = any(hasattr(home, "ALL_ATTENTION_FUNCTIONS") for home in homes)
        return None if pluggable and not self.family.always_observed else self.family.observed

    # -- its forward pass ---------------------------------------------------------------------------------------

    def run(self, input_ids: Tensor, position_ids: Tensor | None = None) -> None:
        """Run one forward pass without the unembedding; without positions it is the model's usual one."""
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if self.takes_cache:
            inputs["use_cache"] = False
        if self.takes_positions and position_ids is not None:
            inputs["position_ids"] = position_ids
        self.decoder(**inputs)

    @property
    def one_by_one(self) -> bool:
        """True if every prompt needs a forward pass of its own.

        That is so where attention is observed, where positions cannot be passed, and where the rotary embedding depends
        on the longest of all positions. It is also so in float64 with a router: many compute in float32, and round
        otherwise beside other prompts.
        """
        narrow_router = self.family.experts is not None and self.dtype == torch.float64
        of_the_longest = any(
            "longrope" in str(kind) or "dynamic" in str(kind)
            for kind in (getattr(module, "rope_type", None) for module in self.decoder.modules())
        )
        return self.observed is not None or not self.takes_positions or of_the_longest or narrow_router

    @property
    def takes_cache(self) -> bool:
        """True if a cache of keys and values can be declined."""
        return self._takes("use_cache")

    @property
    def takes_positions(self) -> bool:
        """True if positions can be passed; else the model counts them (BioGPT), or has none (ALiBi)."""
        return self._takes("position_ids")

    def _takes(self, argument: str) -> bool:
        """True if the forward pass has an argument of this name; a fork's own may be one of (*args, **kwargs)."""
        forwards = [vars(base).get("forward") for base in type(self.decoder).__mro__]
        return any(f is not None and argument in inspect.signature(f).parameters for f in forwards)

    # -- its end ------------------------------------------------------------------------------------------------

    @property
    def unembedding(self) -> nn.Module:
        return self._below_model(self.family.unembedding)

    @property
    def unembedding_bias(self) -> Tensor | None:
        return stored_bias(self.unembedding)

    @property
    def unembedding_device(self) -> torch.device:
        return stored_device(self.unembedding)

    @property
    def vocabulary_size(self) -> int:
        return stored_shape(self.unembedding)[0]

    @property
    def hidden_size(self) -> int:
        """D, the width of the residual stream."""
        return stored_shape(self._project_out or self.unembedding)[1]

    def final_norm(self) -> Norm | None:
        return self._norm(self.final_norm_module)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own logits of normed final hidden states: (..., D) -> (..., vocabulary)."""
        weight = getattr(self.unembedding, "weight", None)
        # a weight that is not floating is quantised
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else self.dtype
        hidden = hidden.to(self.unembedding_device, dtype)
        raw = self.unembedding(self.projected_out(hidden)) * self.family.logit_scale
        cap = self.family.logit_cap
        return raw if cap is None else cap * torch.tanh(raw / cap)

    def projected_out(self, hidden: Tensor) -> Tensor:
        """Return what the decoder gives to the unembedding for normed final hidden states (..., D)."""
        return hidden if self._project_out is None else self._project_out(hidden)

    def token_directions(self, tokens: Tensor, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Directions (K, D) and constants (K,) whose products and sums with hidden states are the logits of ``tokens``.

        All lie on the unembedding's device, where ``tokens`` (K,) are. A cap on the logits is frozen at its ratio
        capped / raw at each token's normed hidden state ``hidden`` (K, D).
        """
        vectors, constants = self.uncapped_directions(tokens, dtype)
        if self.family.logit_cap is None:
            return vectors, constants
        ratio = self.cap_ratio((vectors * hidden.to(vectors)).sum(1) + constants)
        return vectors * ratio[:, None], constants * ratio

    def uncapped_directions(self, tokens: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """:meth:`token_directions` in front of a cap on the logits."""
        vectors, bias = stored_weight(self.unembedding)[tokens].to(dtype), self.unembedding_bias
        if self._project_out is not None:
            vectors = vectors @ stored_weight(self._project_out).to(dtype)
        constants = vectors.new_zeros(len(vectors)) if bias is None else bias[tokens].to(dtype)
        scale = self.family.logit_scale
        return (vectors, constants) if scale == 1.0 else (vectors * scale, constants * scale)

    def cap_ratio(self, raw: Tensor) -> Tensor:
        """The ratio capped / raw of logits in front of the family's cap; ones where it has none."""
        if self.family.logit_cap is None:
            return torch.ones_like(raw)
        raw = raw / self.family.logit_cap
        return torch.where(raw == 0, 1.0, torch.tanh(raw) / torch.where(raw == 0, 1.0, raw))

    @property
    def _project_out(self) -> nn.Module | None:
        return self._below_model(self.family.project_out) if self.family.project_out else None

    # -- modules of a layer -------------------------------------------------------------------------------------

    @overload
    def module(self, index: int, part: AlwaysThere) -> nn.Module: ...

    @overload
    def module(self, index: int, part: str) -> nn.Module | None: ...

    def module(self, index: int, part: str) -> nn.Module | None:
        """The module that the family calls ``part`` in layer ``index``, or None where it has none."""
        return self._part(self.block(index), part)

    def block(self, index: int) -> nn.Module:
        """The module of layer ``index``."""
        block = self.blocks._modules[str(index)]
        assert block is not None
        return block

    def _part(self, block: nn.Module, part: str) -> Any:
        path, find = getattr(self.family, part), below_or_none if part in self.family.partial else below
        return None if path is None else find(block, path)  # much cheaper than get_submodule, which checks every step

    def layer_device(self, index: int) -> torch.device:
        """The device of layer ``index``."""
        return stored_device(self.module(index, "v_proj"))

    def norms(self) -> Iterator[tuple[nn.Module, Norm]]:
        """Every norm that components pass, with its module: on the residual stream, on an output, in a latent."""
        for index in range(self.n_layers):
            for part in [*_BRANCH_NORMS, "v_norm"]:
                module = self.module(index, part)
                if module is not None:
                    yield module, self.made_norm(module)
        if self.final_norm_module is not None:
            yield self.final_norm_module, self.made_norm(self.final_norm_module)

    def weighty(self, index: int, linear_rule: bool = False) -> list[nn.Module | Stacked]:
        """The modules of layer ``index`` whose weights the propagation reads, or the trace (an expert's up).

        Only a ``linear_rule`` reads an MLP's up projection.
        """
        parts = ["v_proj", "v_up", "v_norm", "o_proj"]
        parts += [] if self.is_mixture(index) else ["gate_proj", "down_proj"]
        parts += _BRANCH_NORMS
        modules: list[nn.Module | Stacked] = []
        modules += [module for part in parts if (module := self.module(index, part)) is not None]
        up = below_or_none(self.block(index), self.family.up_proj) if linear_rule else None
        modules += [] if up is None or self.is_mixture(index) else [up]
        if self.is_mixture(index):
            modules += experts.expert_modules(self.block(index), self._experts)
        return modules

    def check_linear_rule(self, rule: str) -> None:
        """Raise ValueError unless the up projection and the activation of every MLP are there, which ``rule`` needs."""
        for index in range(self.n_layers):  # experts always have both
            problem = None if self.is_mixture(index) else unusable_part(self.block(index), self.family)
            if problem is not None:
                place = f"{name_of(self.family.layers)}.{index}.{name_of(problem[0])}"
                raise ValueError(
                    f"allocation: {rule!r} needs the up projection and the activation of every MLP; {place}: "
                    f"{problem[1]} Take another rule, such as 'softmax' or 'taylor'."
                )

    def path(self, index: int, part: str) -> str:
        """The name below the model of what the family calls ``part`` in layer ``index``."""
        path: Path | None = getattr(self.family, part)
        assert path is not None
        return f"{name_of(self.family.layers)}.{index}.{name_of(path)}"

    def name_of(self, module: nn.Module | Stacked) -> str:
        """The name of a module below the model, or that of a tensor of experts."""
        if isinstance(module, Stacked):
            return next(name for name, found in self.model.named_parameters() if found is module.stack)
        return next(name for name, found in self.model.named_modules() if found is module)

    # -- a mixture of experts -----------------------------------------------------------------------------------

    @property
    def experts_per_position(self) -> int:
        """The number of experts that a router sends a position to; 0 in a model without mixtures."""
        return 0 if self.family.experts is None else self.family.experts.top_k

    def is_mixture(self, index: int) -> bool:
        """True if the MLP of layer ``index`` is a mixture of experts."""
        return self.family.experts is not None and experts.has_router(self.block(index), self.family.experts)

    def watch_router(self, index: int, note: Callable[[Tensor, Tensor], None]) -> Callable[[], None]:
        """Have ``note`` called with the weights and indices (T, K) that the router of layer ``index`` decides on.

        Returns the function that undoes it.
        """
        return experts.watch_router(self.block(index), self._experts, note)

    def route(self, index: int, x: Tensor, weights: Tensor, assignment: ExpertAssignment) -> list[RoutedExpert]:
        """Recompute the experts of layer ``index`` on the normed states ``x`` (T, D) that were sent to them."""
        return experts.route(self.block(index), self._experts, x, weights, assignment)

    @property
    def _experts(self) -> Experts:
        if self.family.experts is None:
            raise ValueError("model: it has no mixture of experts.")
        return self.family.experts

    # -- weights of a layer -------------------------------------------------------------------------------------

    def layer(self, index: int) -> Layer:
        """The weights of layer ``index``: the model's own tensors wherever they are plain, in (out, in) layout."""
        return Layer(self.attention(index), self.mlps(index), self.family.parallel)

    def attention(self, index: int) -> Attention:
        """The weights of layer ``index``'s attention alone."""
        block = self.block(index)
        head_dim = self.family.value_dim or self._head_dim(block)
        return Attention(
            **self._branch(block, "attention"),
            v=self._values(block),
            o=replace(self._linear(block, "o_proj"), outer_bias=self._part(block, "o_bias")),
            head_dim=head_dim,
            key_dim=self.family.key_dim or head_dim,
            value_limit=self.family.v_clip,
        )

    def mlps(self, index: int) -> tuple[Mlp, ...]:
        """The weights of layer ``index``'s MLP, or of its experts, alone."""
        block = self.block(index)
        branch = self._branch(block, "mlp")
        if self.is_mixture(index):
            return experts.expert_mlps(block, self._experts, branch)
        return (dense_mlp(block, self.family, branch),)

    def _values(self, block: nn.Module) -> Linear | Latent:
        down = replace(self._linear(block, "v_proj"), part=self.family.v_part)
        if self.family.v_norm is None:
            return down
        up = replace(self._linear(block, "v_up"), part=self.family.v_up_part)
        if down.has_bias or up.has_bias:
            raise ValueError("model: its values go through a latent with a bias, which no component can carry.")
        return Latent(down, self.made_norm(self._part(block, "v_norm")), up)

    def _head_dim(self, block: nn.Module) -> int:
        module = self._part(block, "attention")
        named = getattr(module, "head_dim", None) or getattr(self.config, "head_dim", None)
        return int(named or self.config.hidden_size // self.config.num_attention_heads)

    def _branch(self, block: nn.Module, kind: str) -> dict[str, Any]:
        norm, output, stream = (self._norm(self._part(block, f"{kind}{where}")) for where in _NORMS)
        return {"norm": norm, "output": output, "stream": stream, "factor": self.family.factor}

    def _linear(self, block: nn.Module, part: str) -> Linear:
        return Linear(self._part(block, part))

    def _norm(self, module: nn.Module | None) -> Norm | None:
        return None if module is None else self.made_norm(module)

    def made_norm(self, module: nn.Module) -> Norm:
        weight = getattr(module, "weight", None)
        if weight is not None and self.family.norm_offset:
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.family.norm_offset
        eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), 1e-5)
        return Norm(weight, float(eps), stored_bias(module), centred=self.family.norm == "layer")

    def _below_model(self, path: Path) -> Any:
        return below(self.model, path)
