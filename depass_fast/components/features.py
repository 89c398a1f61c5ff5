"""Features of a sparse dictionary (SAE) as components: activations times decoder rows, plus the error as `rest`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor

from ..adapters import Adapter
from ..inputs.hook_names import RESIDUAL, Site, parse_hook_name, place_in_residual
from ..state.state import Factors
from ..trace.record import Trace
from .base import LayerKind, R, SeveralLayers, by_layer
from .custom import check_site
from .products import BoundProducts

if TYPE_CHECKING:
    from ..results.attribution import Attribution
    from ..results.layered import LayeredAttribution

_ROUNDING = 0.01  # relative difference of two ways to multiply the same matrices, also in TF32


@dataclass(frozen=True, eq=False, repr=False)
class Features(LayerKind[R]):
    """One component per feature of a dictionary that is active in the prompt up to the readout, on the residual stream.

    X[n, f] = a[n, f] · s[n] · W_dec[f], where s is 1 unless the dictionary normalises its inputs. The reconstruction
    error is `rest`, the decoder's bias is `bias` (with s ≠ 1 it is no constant and stays in `rest`).

    ``sae`` is one of SAE Lens, or any object with its ``encode`` (1, N, D) -> (1, N, F), ``decode`` (the way back) and
    ``W_dec`` (F, D). ``layer`` and ``site`` are by default those of the hook that it was trained on, as it says itself
    (``sae.cfg.metadata.hook_name``).

    With ``layers`` there is a dictionary for each: ``sae`` is a mapping of layers to dictionaries, or a list of them.
    Those of a list go to the layers of their own hooks, or are in the order of ``layers`` if they name none. A single
    dictionary that names no hook serves every layer.

    Raises:
        ValueError: the dictionary belongs to another place than the residual stream, or the place is not known.
        TypeError: ``sae`` is no dictionary.
    """

    # None until it is made: the dictionary says
    layer: int | str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    sae: Any = None
    site: Site | None = None  # pyright: ignore[reportIncompatibleVariableOverride]  # one of them once it is made

    kind = "features"
    hooks = tuple(RESIDUAL)
    may_be_complete = True

    if TYPE_CHECKING:  # when it runs, the dataclass makes its own

        @overload
        def __init__(
            self: Features[Attribution],
            layer: int | str | None = None,
            sae: Any = None,
            site: Site | None = None,
            *,
            layers: None = None,
        ) -> None: ...

        @overload
        def __init__(
            self: Features[LayeredAttribution],
            layer: int | str | None = None,
            sae: Any = None,
            site: Site | None = None,
            *,
            layers: SeveralLayers,
        ) -> None: ...

        def __init__(self, *_: Any, **__: Any) -> None: ...

    def __post_init__(self) -> None:
        if self.layers is not None:
            self._read_several()
            return
        _check_dictionary(self.sae, "sae", self.layer)
        super().__post_init__()
        if self.layer is None or self.site is None:
            self._place_like_the_dictionary()

    def _read_several(self) -> None:
        """Check the dictionaries of several layers; those of a list that name their hooks become a mapping.

        Raises:
            ValueError: two of a list have the same hook; one that was trained on one layer is given for several.
        """
        if self.layer is not None:
            raise ValueError("layer: give either layer or layers.")
        given = self.sae
        if isinstance(given, Mapping) or hasattr(given, "items"):  # torch's ModuleDict is no Mapping
            given = dict(given.items())
        elif _is_dictionary(given) or not isinstance(given, Iterable):
            given = _check_dictionary(given, "sae")
            if (name := hook_name(given)) is not None:
                raise ValueError(
                    f"sae: one dictionary for several layers, though it was trained on {name!r}; give one per layer, "
                    "as in {3: sae, 4: other}."
                )
        else:
            given = list(given)
            names = [hook_name(one) for one in given]
            if given and all(name is not None for name in names):
                if twice := next((name for name in names if names.count(name) > 1), None):
                    raise ValueError(f"sae: two dictionaries were trained on {twice!r}; give one for each layer.")
                given = dict(zip(names, given, strict=True))
        items = given.items() if isinstance(given, dict) else enumerate(given) if isinstance(given, list) else ()
        for key, one in items:
            _check_dictionary(one, f"sae[{key!r}]")
        object.__setattr__(self, "sae", given)

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

    def at_layers(self, named: Sequence[int | str], adapter: Adapter) -> list[LayerKind]:
        number, given = lambda layer: self.number(layer, adapter), self.sae
        if isinstance(given, dict):
            # a key that is a hook's name says the site as well
            kinds = {key: replace(self, layer=key, sae=one, layers=None) for key, one in given.items()}
            found = by_layer(kinds, named, number, "sae")
            return [replace(kind, layer=layer) for kind, layer in zip(found, named, strict=True)]
        dictionaries = by_layer(given, named, number, "sae") if isinstance(given, list) else [given] * len(named)
        return [
            replace(self, layer=layer, sae=one, layers=None) for layer, one in zip(named, dictionaries, strict=True)
        ]

    @property
    def output(self) -> str:
        return str(self.site)

    def check(self, adapter: Adapter, lengths: Sequence[int]) -> None:
        super().check(adapter, lengths)
        for one in self.each(adapter):
            assert isinstance(one, Features)
            one._check_one(adapter)

    def _check_one(self, adapter: Adapter) -> None:
        check_site(self.site, adapter)
        if hasattr(getattr(self.sae, "cfg", None), "d_out"):
            raise ValueError("sae: a transcoder writes elsewhere than it reads; its features are not what it reads.")
        shape = tuple(self.sae.W_dec.shape)
        width = adapter.width_at(str(self.site))
        if len(shape) != 2 or shape[1] != width:
            raise ValueError(f"sae: its W_dec must have shape (F, {width}), got {shape}, at layer {self.layer}.")

    def count(self, adapter: Adapter) -> int:
        """The number of features of the dictionary, active or not."""
        return self.sae.W_dec.shape[0]

    def bound(self, adapter: Adapter, trace: Trace, prompt: int) -> BoundProducts:
        layer, site = self.resolve(adapter), cast(Site, self.site)
        x = trace.resid_at(layer, site)[trace.span(prompt)]
        indices, products, bias = _active(self.sae, x, f"prompt {prompt} at layer {layer}")
        labels = tuple(f"L{layer}F{feature}" for feature in indices.tolist())
        return BoundProducts(layer=layer, labels=labels, products=products, bias=bias, site=site)

    def user_tensors(self) -> Sequence[Tensor]:
        return (self.sae.W_dec,)


def _is_dictionary(sae: Any) -> bool:
    return all(hasattr(sae, name) for name in ("encode", "decode", "W_dec"))


def _check_dictionary(sae: Any, name: str, layer: Any = None) -> Any:
    """Return the dictionary. Raises TypeError if it is none."""
    if _is_dictionary(sae):
        return sae
    if hasattr(layer, "encode"):
        raise TypeError("sae: give the dictionary by its name, Features(sae=...); the first argument is the layer.")
    if isinstance(sae, Mapping | list | tuple):
        raise TypeError(f"{name}: several dictionaries go with layers='all', or with a list of layers.")
    missing = [part for part in ("encode", "decode", "W_dec") if not hasattr(sae, part)]
    kind = type(sae).__name__
    raise TypeError(f"{name}: expected a dictionary like SAE Lens', got {kind} without {', '.join(missing)}.")


def hook_name(sae: Any) -> str | None:
    """The hook that a dictionary was trained on: in SAE Lens' metadata, in its config before version 6."""
    config = getattr(sae, "cfg", None)
    return getattr(getattr(config, "metadata", None), "hook_name", None) or getattr(config, "hook_name", None)


def _active(sae: Any, x: Tensor, place: str) -> tuple[Tensor, Factors, Tensor | None]:
    """The active features of hidden states ``x`` (N, D), their products and their bias, on the device of ``x``.

    ``place`` says in errors where these are.

    Raises:
        ValueError: no feature is active, or the decoder is not linear in the activations.
        FloatingPointError: the dictionary makes NaN or inf.
    """
    activations, decoded, offset = _encoded(sae, x)
    indices = (activations != 0).any(0).nonzero().flatten()
    if not len(indices):
        raise ValueError(f"sae: none of its {activations.shape[-1]} features is active in {place}.")

    wide = torch.promote_types(activations.dtype, torch.float32)  # squares overflow in half precision
    vectors, numbers = sae.W_dec[indices].detach().to(wide), activations[:, indices].to(wide)
    if getattr(getattr(sae, "cfg", None), "rescale_acts_by_decoder_norm", False):
        numbers = numbers / vectors.norm(dim=-1)
    plain, wanted, offset = numbers @ vectors, (decoded - offset).to(wide), offset.to(wide)
    if not all(part.isfinite().all() for part in (plain, wanted, offset)):
        raise FloatingPointError(f"sae: its activations or what it decodes hold NaN or inf in {place}.")
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
