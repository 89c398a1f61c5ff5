"""TransformerLens' names of layers and sites, such as `blocks.5.hook_resid_post`.

A name stands for a layer number and a site; results and labels carry the layer number.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Literal

from ..runtime.numbers import as_index

Site = Literal["resid_pre", "resid_mid", "resid_post"]
SITES = ("resid_pre", "resid_mid", "resid_post")
RESIDUAL: dict[str, Site] = {f"hook_{site}": site for site in SITES}

# hook -> the layer whose input it is, counted from the layer in the name
LAYER_INPUT = {"hook_resid_pre": 0, "hook_resid_post": 1}

# hook of TransformerLens' bridge -> the usual name of the same place
_BRIDGE_NAMES = {
    "hook_in": "hook_resid_pre",
    "ln2.hook_in": "hook_resid_mid",
    "hook_out": "hook_resid_post",
    "attn.hook_out": "hook_attn_out",
    "mlp.hook_out": "hook_mlp_out",
    "attn.o.hook_in": "attn.hook_z",
    "mlp.out.hook_in": "mlp.hook_post",
}


def parse_hook_name(name: str, argument: str, fitting: Collection[str]) -> tuple[int, str]:
    """The layer and the hook of a name: `blocks.5.hook_resid_post` -> (5, "hook_resid_post").

    Raises:
        ValueError: it is no such name, or its hook is none of ``fitting``; the message lists these.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+(?:\.\w+)*)", name, re.ASCII)
    hook = _BRIDGE_NAMES.get(match[2], match[2]) if match else None
    if match is None or hook is None or hook not in fitting:
        wanted = " or ".join(f"'blocks.<layer>.{fit}'" for fit in fitting)
        wrong = "is no hook name" if match is None else "does not fit here"
        raise ValueError(f"{argument}: {name!r} {wrong}; give a layer's number, or {wanted}.")
    return int(match[1]), hook


def layer_input(value: Any, argument: str) -> int:
    """The layer whose input ``value`` stands for: a number, or the name of a residual stream between two layers."""
    if not isinstance(value, str):
        return as_index(value, argument)
    layer, hook = parse_hook_name(value, argument, LAYER_INPUT)
    return layer + LAYER_INPUT[hook]


def place_in_residual(layer: int, hook: str, site: Site | None) -> dict[str, Any]:
    """The fields `layer` and `site` that a hook of the residual stream stands for.

    Raises:
        ValueError: ``site`` is given, and the hook is at another one.
    """
    if site not in (None, RESIDUAL[hook]):
        raise ValueError(f"site: {site!r} is not {hook!r}, which the layer's name says.")
    return {"layer": layer, "site": RESIDUAL[hook]}
