"""Features of a sparse dictionary (SAE) as components: activations times decoder rows, plus the error as `rest`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..adapters import Adapter
from ..inputs.hook_names import RESIDUAL, Site, parse_hook_name, place_in_residual
from ..state.state import Factors
from ..trace.record import Trace
from .base import ComponentKind
from .custom import check_site
from .products import BoundProducts

_ROUNDING = 0.01  # relative difference of two ways to multiply the same matrices, also in TF32


@dataclass(frozen=True, eq=False, repr=False)
class Features(ComponentKind):
    """One component per feature of a dictionary that is active in the prompt up to the readout, on the residual stream.

    X[n, f] = a[n, f] · s[n] · W_dec[f], where s is 1 unless the dictionary normalises its inputs. The reconstruction
    error is `rest`, the decoder's bias is `bias` (with s ≠ 1 it is no constant and stays in `rest`).

    ``sae`` is one of SAE Lens, or any object with its ``encode`` (1, N, D) -> (1, N, F), ``decode`` (the way back) and
    ``W_dec`` (F, D). ``layer`` and ``site`` are by default those of the hook that it was trained on, as it says itself
    (``sae.cfg.metadata.hook_name``).

    Raises:
        ValueError: the dictionary belongs to another place than the residual stream, or the place is not known.
        TypeError: ``sae`` is no dictionary.
    """

    # None until it is made: the dictionary says
    layer: int | str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    sae: Any = None
    site: Site | None = None  # one of them once it is made

    kind = "features"
    hooks = tuple(RESIDUAL)
    may_be_complete = True

    def __post_init__(self) -> None:
        missing = [name for name in ("encode", "decode", "W_dec") if not hasattr(self.sae, name)]
        if missing and hasattr(self.layer, "encode"):
            raise TypeError("sae: give the dictionary by its name, Features(sae=...); the first argument is the layer.")
        if missing:
            kind = type(self.sae).__name__
            raise TypeError(f"sae: expected a dictionary like SAE Lens', got {kind} without {', '.join(missing)}.")
        super().__post_init__()
        if self.layer is None or self.site is None:
            self._place_like_the_dictionary()

    def place(self, layer: int, hook: str) -> dict[str, Any]:
        return place_in_residual(layer, hook, self.site)

    def _place_like_the_dictionary(self) -> None:
        """Fill in the missing layer and site. A layer alone moves the dictionary to the same site of that layer."""
        name = hook_name(self.sae)
        if name is None:
            raise ValueError("layer, site: the dictionary names no hook; give both, or a hook name as the layer.")
        layer, hook = parse_hook_name(name, "sae", self.hooks)
        object.__setattr__(self, "layer", layer if self.layer is None else self.layer)
        object.__setattr__(self, "site", RESIDUAL[hook] if self.site is None else self.site)

    def check(self, adapter: Adapter, lengths: Sequence[int]) -> None:
        super().check(adapter, lengths)
        check_site(self.site, adapter)
        if hasattr(getattr(self.sae, "cfg", None), "d_out"):
            raise ValueError("sae: a transcoder writes elsewhere than it reads; its features are not what it reads.")
        shape = tuple(self.sae.W_dec.shape)
        if len(shape) != 2 or shape[1] != adapter.hidden_size:
            raise ValueError(f"sae: its W_dec must have shape (F, {adapter.hidden_size}), got {shape}.")

    def bound(self, adapter: Adapter, trace: Trace, prompt: int) -> BoundProducts:
        layer, site = self.resolve(adapter), cast(Site, self.site)
        x = trace.resid_at(layer, site)[trace.span(prompt)]
        indices, products, bias = _active(self.sae, x, prompt)
        labels = tuple(f"L{layer}F{feature}" for feature in indices.tolist())
        return BoundProducts(layer=layer, labels=labels, products=products, bias=bias, site=site)

    def user_tensors(self) -> Sequence[Tensor]:
        return (self.sae.W_dec,)


def hook_name(sae: Any) -> str | None:
    """The hook that a dictionary was trained on: in SAE Lens' metadata, in its config before version 6."""
    config = getattr(sae, "cfg", None)
    return getattr(getattr(config, "metadata", None), "hook_name", None) or getattr(config, "hook_name", None)


def _active(sae: Any, x: Tensor, prompt: int) -> tuple[Tensor, Factors, Tensor | None]:
    """The active features of hidden states ``x`` (N, D), their products and their bias, on the device of ``x``.

    Raises:
        ValueError: no feature is active, or the decoder is not linear in the activations.
        FloatingPointError: the dictionary makes NaN or inf.
    """
    activations, decoded, offset = _encoded(sae, x)
    indices = (activations != 0).any(0).nonzero().flatten()
    if not len(indices):
        raise ValueError(f"sae: none of its {activations.shape[-1]} features is active in prompt {prompt}.")

    wide = torch.promote_types(activations.dtype, torch.float32)  # squares overflow in half precision
    vectors, numbers = sae.W_dec[indices].detach().to(wide), activations[:, indices].to(wide)
    if getattr(getattr(sae, "cfg", None), "rescale_acts_by_decoder_norm", False):
        numbers = numbers / vectors.norm(dim=-1)
    plain, wanted, offset = numbers @ vectors, (decoded - offset).to(wide), offset.to(wide)
    if not all(part.isfinite().all() for part in (plain, wanted, offset)):
        raise FloatingPointError(f"sae: its activations or what it decodes hold NaN or inf in prompt {prompt}.")
    scale = _input_scale(sae, plain, wanted, offset, torch.finfo(activations.dtype).eps)
    bias = offset[0] if (scale == 1).all() and torch.allclose(offset, offset[:1]) and offset.any() else None
    products = Factors((numbers * scale[:, None]).to(x.device), vectors.to(x.device))
    return indices, products, None if bias is None else bias.detach().to(x.device)


def _encoded(sae: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Activations (N, F), their reconstruction (N, D), and the reconstruction of no activation at all (N, D)."""
    before = dict(vars(sae))  # encoding leaves its mark on a dictionary that normalises its inputs
    try:
        inputs = x.to(sae.W_dec)[None]
        activations = sae.encode(inputs)
        activations = activations.to_dense() if activations.is_sparse else activations
        decoded = sae.decode(activations)[0]  # undoes the normalisation of the input that was encoded last
        sae.encode(inputs)
        offset = sae.decode(torch.zeros_like(activations))[0]
    finally:
        vars(sae).clear()
        vars(sae).update(before)
    return activations[0], decoded, offset


def _input_scale(sae: Any, plain: Tensor, wanted: Tensor, offset: Tensor, eps: float) -> Tensor:
    """The scale s (N,) that makes ``plain`` products (N, D) the ``wanted`` reconstruction, without its ``offset``.

    Raises:
        ValueError: there is none, as the decoder is not linear in the activations.
    """
    allowed = max(_ROUNDING, eps**0.5) * (wanted.norm(dim=-1) + offset.norm(dim=-1))
    scale = torch.ones_like(plain[:, 0])
    if ((plain - wanted).norm(dim=-1) > allowed).any():
        scale = (plain * wanted).sum(-1) / plain.square().sum(-1).clamp_min(torch.finfo(plain.dtype).tiny)
    if ((scale[:, None] * plain - wanted).norm(dim=-1) > allowed).any():
        raise ValueError(f"sae: what {type(sae).__name__} decodes is not its activations times W_dec, plus a bias.")
    return scale
