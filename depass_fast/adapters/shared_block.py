"""Zamba's streams: x, the first embedding e beside it, and t, what a block shared between layers hands to a mixer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .family import Family, Path
from .paths import below
from .streams import LayerStreams, SideMap, Streams, StreamStep, Watch

_X, _E, _T = torch.eye(3).tolist()  # the weights by which one of them is read, or written to
_X_AND_E = [_X, _E, [0.0, 0.0, 0.0]]  # the mix that lets go of t


@dataclass(frozen=True)
class SharedBlock(Streams):
    """The streams [x, e, t]. e never changes, and t is zero wherever a module of the model begins.

    A module with a shared block is two layers. In the ``block``, attention reads x and e side by side and writes to t,
    and the MLP reads t and writes in its place. The ``mixer`` behind it reads x + t, writes to x, and t is let go. A
    layer of a mixer ``alone`` reads x and writes to it. ``linear`` is the path of what gives t, in such a module.
    """

    layer_is: Literal["block", "mixer", "alone"]
    linear: Path = "linear"

    @property
    def count(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 3

    def numbers(self) -> tuple[int, int]:
        return {"block": (6 + 9 + 3) + (3 + 9 + 3), "mixer": 3 + 9 + 3, "alone": 3 + 3}[self.layer_is], 0

    def watches(self, block: nn.Module) -> Sequence[tuple[nn.Module, Watch]]:
        found: list[tuple[nn.Module, Watch]] = [(block, _entering)]
        if self.layer_is == "mixer":
            found.append((below(block, self.linear), lambda args, kwargs, output: {"t": _packed(output)}))
        return found

    @property
    def gathered_streams(self) -> int:  # e is the same one everywhere; a block's streams in front of its MLP are three
        return {"block": 2 + 2, "mixer": 1, "alone": 2}[self.layer_is]

    def gathered(self, record: dict[str, Any]) -> None:
        parts = [record.pop(name, None) for name in ("x", "e", "t")]
        if parts[0] is not None:
            record["streams_pre"] = _side_by_side(*parts)

    def layer(
        self, block: nn.Module, record: dict[str, Any], side: SideMap | None
    ) -> tuple[LayerStreams, Tensor | None]:
        x = record["streams_pre"]

        def step(read: list, mix: list | None, write: list) -> StreamStep:
            return StreamStep(*(None if one is None else _everywhere(one, x) for one in (read, mix, write)))  # type: ignore[arg-type]

        if self.layer_is == "alone":
            return LayerStreams(step(_X, None, _X)), None
        if self.layer_is == "mixer":
            return LayerStreams(step([1.0, 0.0, 1.0], _X_AND_E, _X)), None
        mid = torch.cat([x[:, : 2 * x.shape[1] // 3], record["resid_mid"]], 1)
        return LayerStreams(step([_apart(_X), _apart(_E)], _X_AND_E, _T), step(_T, _X_AND_E, _T)), mid

    def end(self, decoder: nn.Module, last: nn.Module) -> tuple[nn.Module, Watch]:
        def watch(args: tuple, kwargs: dict[str, Any], output: Any) -> dict[str, Tensor]:
            x = _packed(output[0] if isinstance(output, tuple) else output)
            final = _side_by_side(x, _entering(args, kwargs, output)["e"], None)
            return {"streams_final": final, "end_read": _everywhere(_X, x)}

        return last, watch


def with_shared_blocks(
    kinds: Sequence[str],
    mixer: Callable[[str, SharedBlock], Family],
    home: str,
    parts: Callable[[str, int], dict[str, Any]],
) -> Family:
    """The declaration of a model of such layers, whose ``kinds`` are "hybrid" where a module has a shared block.

    ``mixer(path, streams)`` declares the layer of a mixer that is below a path, which ends in a dot or is empty.
    ``home`` is the path of a block, and ``parts(path, number)`` are those of its MLP, whose path is given, and others
    that depend on the number of the use of a block.
    """
    alone, behind = mixer("", SharedBlock("alone")), mixer("mamba_decoder.", SharedBlock("mixer"))
    layers: list[Family] = []
    homes: list[int] = []
    for index, kind in enumerate(kinds):
        if kind == "hybrid":
            layers.append(_block(home, parts(f"{home}.feed_forward", kinds[:index].count("hybrid"))))
            homes.append(index)
        layers.append(behind if kind == "hybrid" else alone)
        homes.append(index)
    return replace(alone, final_norm="model.final_layernorm", kinds=tuple(layers), homes=tuple(homes))


def _block(home: str, parts: dict[str, Any]) -> Family:
    attention, mlp = f"{home}.self_attn", f"{home}.feed_forward"
    return Family(
        attention=attention,
        attention_norm=f"{home}.input_layernorm",
        v_proj=f"{attention}.v_proj",
        o_proj=f"{attention}.o_proj",
        mlp=mlp,
        mlp_norm=f"{home}.pre_ff_layernorm",
        down_proj=f"{mlp}.down_proj",
        down_behind="linear",
        act_fn=f"{mlp}.act_fn",
        streams=SharedBlock("block"),
        **parts,
    )


def _apart(numbers: list[float]) -> list[list[float]]:
    return [[number] for number in numbers]


def _packed(x: Tensor) -> Tensor:
    return x.detach().flatten(0, -2)


def _entering(args: tuple, kwargs: dict[str, Any], output: Any) -> dict[str, Tensor]:
    """Return x and e, which every module is called with, both (T, D)."""
    names = ("hidden_states", "original_hidden_states")
    x, e = (args[place] if place < len(args) else kwargs[name] for place, name in enumerate(names))
    return {"x": _packed(x), "e": _packed(e)}


def _side_by_side(x: Tensor, e: Tensor, t: Tensor | None) -> Tensor:
    return torch.cat([x, e, torch.zeros_like(x) if t is None else t], 1)


def _everywhere(numbers: list, like: Tensor) -> Tensor:
    """Return the same numbers for all positions of ``like`` (T, ...), in its dtype: (T, ...)."""
    one = torch.tensor(numbers, dtype=like.dtype, device=like.device)
    return one.expand(len(like), *one.shape).contiguous()
