"""The features of a dictionary as nodes of a graph: what they write to the stream, and what they read of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..components.base import ComponentKind
from ..components.features import Features
from ..components.products import BoundProducts
from ..request import Request

Site = tuple[int, str]  # the layer, and the name of its site


class Dictionary:
    """The active features of one dictionary on a traced prompt of T tokens.

    numbers (T, F) times vectors (F, D) is what they write to the stream, as the components of the same kind do.
    ``names`` are their labels, ``features`` their numbers in the dictionary.
    """

    def __init__(self, kind: Features, request: Request, dtype: torch.dtype) -> None:
        bound = kind.bound(request.adapter, request.require_trace(), 0)
        self.layer, self.sae, self.names = bound.resolve(request.adapter), kind.sae, bound.labels
        self.features = [int(label.rpartition("F")[2]) for label in bound.labels]
        self.numbers, self.vectors = (x.to(dtype) for x in _factors(bound))
        self.site: Site = _place(self.layer, str(kind.site), request.adapter.n_layers)

    def read(self, x: Tensor, positions: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return what K features read of hidden states ``x`` (T, D): their activations (K,), and gradients (K, D).

        An encoder is linear in the states where the same features are active, up to a constant.

        Raises:
            ValueError: no gradient goes through the encoder.
        """
        features = torch.tensor([self.features[i] for i in which.tolist()], device=self.sae.W_dec.device)
        before = dict(vars(self.sae))  # encoding leaves its mark on a dictionary that normalises its inputs
        try:
            with torch.enable_grad():
                given = x[positions].detach().to(self.sae.W_dec).requires_grad_()
                encoded = self.sae.encode(given[None])[0]
                encoded = encoded.to_dense() if encoded.is_sparse else encoded
                found = encoded.gather(1, features[:, None])[:, 0]
                if not found.requires_grad:
                    raise ValueError(f"features: no gradient goes through the encoder of {type(self.sae).__name__}.")
                (gradients,) = torch.autograd.grad(found.sum(), given)
        finally:
            vars(self.sae).clear()
            vars(self.sae).update(before)
        return found.detach().to(self.numbers), gradients.to(self.numbers)


def kinds_of(given: Any) -> list[ComponentKind]:
    """Return the dictionaries that a graph was given, as kinds of components.

    Raises:
        TypeError: one of them is no `Features`.
    """
    if given is None:
        return []
    several = [given] if isinstance(given, ComponentKind) else list(given) if isinstance(given, Sequence) else [given]
    for one in several:
        if not isinstance(one, Features):
            raise TypeError(f"features: expected Features(...), or a list of them, got {one!r}.")
    return several


def dictionaries_of(kinds: Sequence[ComponentKind], request: Request, dtype: torch.dtype) -> dict[Site, Dictionary]:
    """Return the dictionaries by their places in the stream.

    Raises:
        ValueError: two are at the same place, or one is none of the residual stream of this model.
    """
    found: dict[Site, Dictionary] = {}
    for kind in kinds:
        for one in kind.each(request.adapter):
            assert isinstance(one, Features)
            dictionary = Dictionary(one, request, dtype)
            if dictionary.site in found:
                raise ValueError(f"features: two dictionaries are at the same place, layer {dictionary.layer}.")
            found[dictionary.site] = dictionary
    return found


def _factors(bound: BoundProducts) -> tuple[Tensor, Tensor]:
    numbers = bound.products.coefficients
    assert numbers is not None  # only those of tokens are not written down
    return numbers, bound.products.vectors


def _place(layer: int, site: str, n_layers: int) -> Site:
    """Return the only name of a place: the end of a layer is the input of the next one."""
    return (layer + 1, "resid_pre") if site == "resid_post" else (layer, site)
