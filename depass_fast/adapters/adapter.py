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
from .adapted import adapted
from .dense import unusable_part
from .experts import ExpertAssignment, RoutedExpert
from .family import Experts, Observed, Path
from .head_experts import outputs_of_experts
from .keyed import WithEntries, grouped
from .kinds import LayerKinds
from .layer_mlps import inner_norms, layer_mlps
from .looked_up import once
from .maps import Joined, Latent, Linear, Norm, PassesOn, Taps, mixing_norms
from .paths import below, below_or_none, name_of
from .shift import Shift
from .side_by_side import Sides, side_by_side
from .spread import Spread
from .stored import Stacked, stored_device
from .streams import SideMap
from .tuned import modules_of
from .weights import Attention, Layer, Mlp

_NORMS = ("_norm", "_output_norm", "_stream_norm")  # of a branch
_BRANCH_NORMS = [f"{branch}{kind}" for branch in ("attention", "mlp") for kind in _NORMS]
_OF_SOURCE = ("v_proj", "v_norm", "v_up", "v_head_norm", "k_proj")  # parts that another layer may have in its place

# the parts that every layer has, except that a mixture of experts has no projections of an MLP
AlwaysThere = Literal["attention", "v_proj", "o_proj", "mlp", "gate_proj", "down_proj"]


@dataclass(frozen=True)
class Adapter(LayerKinds):
    """A model and where its family keeps its parts. Nothing outside this package reads the declaration itself."""

    # -- its attention ------------------------------------------------------------------------------------------

    @property
    def has_alibi(self) -> bool:
        """True if the logits of keys are raised by their distance (ALiBi)."""
        return self.family.alibi

    @property
    def has_sinks(self) -> bool:
        """True if every query has, beside the keys' logits, a logit of nothing (gpt-oss)."""
        return self.family.sinks

    def has_indexer(self, index: int) -> bool:
        """True if layer ``index`` selects keys by itself; of several layers the first may do so for the others."""
        kind = self.kind(index)
        return kind.selects is not None and below_or_none(self.block(index), kind.indexer) is not None

    def chunks(self, index: int) -> bool:
        """True if a query of layer ``index`` sees its own chunk of positions, of the window's size, and no other."""
        window = self.family.window
        return self.family.chunked and (window[index] if isinstance(window, tuple) else window) is not None

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
        first = next((i for i in range(self.n_layers) if self.has_attention(i) and self.kind(i).mixer is None), None)
        if first is None:
            return None
        attention = type(self.module(first, "attention"))
        homes = [sys.modules[base.__module__] for base in attention.__mro__]
        pluggable = any(hasattr(home, "ALL_ATTENTION_FUNCTIONS") for home in homes)
        kind = self.kind(first)
        return None if pluggable and not kind.always_observed else kind.observed

    # -- its forward pass ---------------------------------------------------------------------------------------

    def run(self, input_ids: Tensor, position_ids: Tensor | None = None) -> None:
        """Run one forward pass without the unembedding; without positions it is the model's usual one."""
        inputs: dict[str, Any] = {"input_ids": input_ids, **self.cache_choice}
        if self.takes_positions and position_ids is not None:
            inputs["position_ids"] = position_ids
        self.decoder(**inputs)

    @property
    def one_by_one(self) -> bool:
        """True if every prompt needs a forward pass of its own.

        That is so where attention is observed, where positions cannot be passed or a layer counts them by itself,
        where an indexer selects keys, and
        where the rotary embedding depends on the longest of all positions. It is also so in float64 with a router: many
        compute in float32, and round otherwise beside other prompts.
        """
        narrow_router = self.experts_per_position > 0 and self.dtype == torch.float64
        of_the_longest = any(
            "longrope" in str(kind) or "dynamic" in str(kind)
            for kind in (getattr(module, "rope_type", None) for module in modules_of(self.decoder))
        )
        counted = self.family.counts_positions or not self.takes_positions
        alone = self.observed is not None or counted or self.selects is not None
        return alone or of_the_longest or narrow_router

    @property
    def cache_choice(self) -> dict[str, Any]:
        """The arguments of a forward pass that decline a cache, where one can be declined."""
        return {"use_cache": self.family.with_cache} if self._takes("use_cache") else {}

    @property
    def takes_positions(self) -> bool:
        """True if positions can be passed; else the model counts them (BioGPT), or has none (ALiBi)."""
        return self._takes("position_ids")

    def _takes(self, argument: str) -> bool:
        """True if the forward pass has an argument of this name; a fork's own may be one of (*args, **kwargs)."""
        forwards = [vars(base).get("forward") for base in type(self.decoder).__mro__]
        return any(f is not None and argument in inspect.signature(f).parameters for f in forwards)

    # -- modules of a layer -------------------------------------------------------------------------------------

    @overload
    def module(self, index: int, part: AlwaysThere) -> nn.Module: ...

    @overload
    def module(self, index: int, part: str) -> nn.Module | None: ...

    def module(self, index: int, part: str) -> nn.Module | None:
        """The module that the family calls ``part`` in layer ``index``, or None where it has none."""
        index = self._home(index, part)
        kind = self.kind(index)
        path: Path | None = getattr(kind, part)
        if path is None or not self.has_part(index, part):
            return None
        find = below_or_none if part in kind.partial else below
        if isinstance(path, str) and path.startswith("next."):  # a norm that stands in front of the next layer
            return find(self.block(index + 1), path.removeprefix("next."))
        return find(self.block(index), path)  # get_submodule would check every step

    def _home(self, index: int, part: str) -> int:
        """The layer that has the ``part`` of layer ``index``: another one where its keys and values are shared."""
        source = self.kind(index).source
        return source if source is not None and part in _OF_SOURCE else index

    def beside(self, index: int) -> nn.Module:
        """The module of the attention beside the recurrence of layer ``index``."""
        beside = self.kind(index).beside
        assert beside is not None and beside.attention is not None
        return below(self.block(index), beside.attention)

    def layer_device(self, index: int) -> torch.device:
        """The device of layer ``index``."""
        if self.has_attention(index):
            return stored_device(self.module(index, "o_proj"))
        return stored_device(self.module(index, "mlp" if self.is_mixture(index) else "gate_proj"))

    def norms(self) -> Iterator[tuple[nn.Module, Norm]]:
        """Every norm that components pass, with its module: on the residual stream, on an output, in a latent."""
        for index in range(self.n_layers):
            modules = [self.module(index, p) for p in [*_BRANCH_NORMS, "v_norm"] if self.has_part(index, p)]
            for module in [*modules, *inner_norms(self.block(index), self.kind(index), self.is_mixture(index))]:
                if module is not None:
                    yield module, self.made_norm(module)
        if self.final_norm_module is not None:
            yield self.final_norm_module, self.made_norm(self.final_norm_module)

    def weighty(self, index: int, linear_rule: bool = False) -> list[nn.Module | Stacked]:
        """The modules of layer ``index`` whose weights the propagation reads, or the trace (an expert's up).

        Only a ``linear_rule`` reads an MLP's up projection.
        """
        parts = ["v_proj", "v_second", "v_entries", "v_up", "v_norm", "o_front", "o_proj"]
        parts += ["gate_proj", "down_proj", "down_behind", "mlp_inner_norm"] if self.has_dense_mlp(index) else []
        parts = [part for part in [*parts, *_BRANCH_NORMS] if self.has_part(index, part)]
        modules: list[nn.Module | Stacked] = []
        modules += [self.inside_gate(module) for part in parts if (module := self.module(index, part)) is not None]
        plain = linear_rule and self.has_dense_mlp(index)
        more = [below_or_none(self.block(index), self.kind(index).up_proj)] if plain else []
        more += [one for part in ("v_proj", "gate_proj") for one in self.added_to(index, part) or ()]
        modules += [one for one in more if one is not None]
        if self.is_mixture(index):
            modules += experts.expert_modules(self.block(index), self._experts(index))
        return modules

    def check_linear_rule(self, rule: str) -> None:
        """Raise ValueError unless the up projection and the activation of every MLP are there, which ``rule`` needs."""
        for index in range(self.n_layers):  # experts always have both
            skipped = self.is_mixture(index) or not self.has_mlp(index)
            problem = None if skipped else unusable_part(self.block(index), self.kind(index))
            if problem is not None:
                place = f"{name_of(self.family.layers)}.{index}.{name_of(problem[0])}"
                raise ValueError(
                    f"allocation: {rule!r} needs the up projection and the activation of every MLP; {place}: "
                    f"{problem[1]} Take another rule, such as 'softmax' or 'taylor'."
                )

    def path(self, index: int, part: str) -> str:
        """The name below the model of what the family calls ``part`` in layer ``index``."""
        index = self._home(index, part)
        path: Path | None = getattr(self.kind(index), part)
        assert path is not None
        return f"{name_of(self.family.layers)}.{self.home(index)}.{name_of(path)}"

    def name_of(self, module: nn.Module | Stacked) -> str:
        """The name of a module below the model, or that of a tensor of experts."""
        if isinstance(module, Stacked):
            return next(name for name, found in self.model.named_parameters() if found is module.stack)
        return next(name for name, found in self.model.named_modules() if found is module)

    # -- a mixture of experts -----------------------------------------------------------------------------------

    def experts_module(self, index: int) -> nn.Module:
        """The module of layer ``index`` that is given the normed states for its experts."""
        declared = self._experts(index)
        alone = declared.beside is None and not declared.ahead
        return self.module(index, "mlp") if alone else below(self.block(index), declared.experts)

    def watch_router(self, index: int, note: Callable[[Tensor, Tensor], None]) -> Callable[[], None]:
        """Have ``note`` called with the weights and indices (T, K) that the router of layer ``index`` decides on.

        Returns the function that undoes it.
        """
        return experts.watch_router(self.block(index), self._experts(index), note)

    def route(self, index: int, x: Tensor, weights: Tensor, assignment: ExpertAssignment) -> list[RoutedExpert]:
        """Recompute the experts of layer ``index`` on the normed states ``x`` (T, D) that were sent to them."""
        return experts.route(self.block(index), self._experts(index), x, weights, assignment)

    def _experts(self, index: int) -> Experts:
        declared = self.kind(index).experts
        if declared is None:
            raise ValueError("model: it has no mixture of experts.")
        return declared

    # -- weights of a layer -------------------------------------------------------------------------------------

    def layer(self, index: int) -> Layer:
        """The weights of layer ``index``: the model's own tensors wherever they are plain, in (out, in) layout."""
        mixing: Any = self.attention(index) if self.has_attention(index) else None
        return Layer(mixing, self.mlps(index), self.kind(index).parallel, self.side(index))

    def side(self, index: int) -> SideMap | None:
        """The linear map beside layer ``index``'s attention, in models of several streams that have one."""
        streams, block = self.kind(index).streams, self.block(index)
        module = None if streams is None else below_or_none(block, self.kind(index).attention_norm)
        return None if streams is None or module is None else streams.side(block, self.made_norm(module))

    def attention(self, index: int) -> Attention:
        """The weights of layer ``index``'s attention, or of its recurrence, or of both side by side."""
        if self.kind(index).beside is not None:
            both = self.sides(index)
            assert both is not None
            return side_by_side(*both)
        return once(self, ("attention", index), lambda: self._attention(index))

    def sides(self, index: int) -> Sides | None:
        """The weights of attention, and of the recurrence beside it, where layer ``index`` has both; else None."""
        beside = self.kind(index).beside
        return None if beside is None else (Adapter(self.model, beside)._attention(index), self._attention(index))

    def _attention(self, index: int) -> Attention:
        kind, branch = self.kind(index), self._branch(index, "attention")
        head_dim = kind.value_dim or self._head_dim(index)
        if kind.source is not None:
            self._check_source(index, kind.source)
            branch["norm"] = self._norm(self.module(kind.source, "attention_norm"))
        head_norm, front, bias = (self.module(index, part) for part in ("v_head_norm", "o_front", "o_bias"))
        v, o = (
            self._values(index),
            replace(grouped(self._linear(index, "o_proj"), front, kind.o_groups), outer_bias=bias),
        )
        if kind.head_experts is not None:
            o = outputs_of_experts(self.block(index), kind.head_experts, o, v.shape[0] // head_dim)
        return Attention(
            **branch,
            v=v,
            o=o,
            head_dim=head_dim,
            key_dim=kind.key_dim or head_dim,
            value_limit=kind.v_clip,
            conv=self._conv(index),
            is_recurrent=kind.mixer is not None,
            is_keyed=kind.keyed is not None,
            scales_heads=kind.head_scale is not None or (kind.mixer is not None and not kind.mixer.attends),
            value_norm=None if head_norm is None else self.made_norm(head_norm),
            source=kind.source,
            reads=kind.reads,
        )

    def _check_source(self, index: int, source: int) -> None:
        if self.layer_device(index) != self.layer_device(source):
            raise ValueError(
                f"model: layer {index} takes the keys and values of layer {source}, which lies on another device; put "
                "both on one."
            )

    def mlps(self, index: int) -> tuple[Mlp, ...]:
        """The weights of layer ``index``'s MLP, or of its experts, alone."""
        return once(self, ("mlps", index), lambda: self._mlps(index)) if self.has_mlp(index) else ()

    def _mlps(self, index: int) -> tuple[Mlp, ...]:
        kind, branch, block = self.kind(index), self._branch(index, "mlp"), self.block(index)
        inner = self._norm(self.module(index, "mlp_inner_norm"))
        ahead = self._norm(self.module(index - 1, "mlp_norm")) if kind.has_experts_ahead else None
        return layer_mlps(
            block, kind, branch, self.is_mixture(index), inner, None if ahead is None else (index - 1, ahead)
        )

    def has_part(self, index: int, part: str) -> bool:
        """True unless layer ``index`` lacks the branch that ``part`` belongs to."""
        of_mlp = part.startswith("mlp") or part in ("gate_proj", "up_proj", "down_proj", "down_behind")
        return self.has_mlp(index) if of_mlp else self.has_attention(index)

    def _conv(self, index: int) -> Linear | None:
        """The convolution of values along the positions, as ``weight`` (Hkv·d, 1, taps); None without one."""
        mixer = self.kind(index).mixer
        if mixer is not None and mixer.taps is not None:
            place = self._there(index, "v_proj")
            taps = mixer.taps[:, None].to(stored_device(place), self.dtype)
            return Taps(place, mixer.conv_part, taps=taps)
        if mixer is None or mixer.conv is None:
            return None
        module = below_or_none(self.block(index), mixer.conv)
        return None if module is None else (PassesOn if mixer.conv_adds else Linear)(module, mixer.conv_part)

    def _values(self, index: int) -> Linear | Latent | WithEntries:
        kind = self.kind(index)
        second = self.module(index, "v_second")
        if second is not None:
            return Joined(self._there(index, "v_proj"), kind.v_part, second=second)
        down = adapted(replace(self._linear(index, "v_proj"), part=kind.v_part), self.added_to(index, "v_proj"))
        if kind.v_entries is not None:
            return WithEntries(down, self._linear(index, "v_entries"))
        if kind.v_norm is None:
            return down
        up = replace(self._linear(index, "v_up"), part=kind.v_up_part)
        if down.has_bias or up.has_bias:
            raise ValueError("model: its values go through a latent with a bias, which no component can carry.")
        norm, factor = self.made_norm(self._there(index, "v_norm")), kind.v_norm_factor
        if factor != 1.0:
            assert norm.weight is not None
            norm = replace(norm, weight=norm.weight * factor)
        return Latent(down, norm, up)

    def _head_dim(self, index: int) -> int:
        module = self.module(index, "attention")
        named = getattr(module, "head_dim", None) or getattr(self.config, "head_dim", None)
        return int(named or self.config.hidden_size // self.config.num_attention_heads)

    def _branch(self, index: int, kind: str) -> dict[str, Any]:
        norm, output, stream = (self._norm(self.module(index, f"{kind}{where}")) for where in _NORMS)
        factor, own = self.kind(index).factor, self.kind(index).mlp_factor
        factor = factor if kind == "attention" or own is None else own
        keeps, mix = (getattr(self.kind(index), f"{kind}_{what}") for what in ("keeps", "mix"))
        if mix is not None:
            output, stream = mixing_norms(*mix(self.block(index)))
        weight, front = below_or_none(self.block(index), getattr(self.kind(index), f"{kind}_shift")), None
        if weight is not None and norm is not None:
            norm, front = None, Shift(norm, weight.flatten())
        beside = {"front": front, "spread": Spread.of(self.module(index, f"{kind}_conv"))}
        return {"norm": norm, "output": output, "stream": stream, "factor": factor, "keeps": keeps, **beside}

    def _linear(self, index: int, part: str) -> Linear:
        return Linear(self._there(index, part))

    def _there(self, index: int, part: str) -> nn.Module:
        module = self.module(index, part)
        assert module is not None  # the family declares it for this layer
        return module
