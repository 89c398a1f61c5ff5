"""The layers of one prompt as a sweep passes them: their maps, kept between the ways there and back where it pays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import Adapter, Layer
from ..backends.selection import why_not_triton
from ..runtime.progress import Parts
from ..runtime.transfer import to_host
from ..trace.record import Trace
from .maps import LayerMaps

KEPT = 1 << 28  # elements of all layers' probabilities, above which none are kept between the ways there and back


def maps_class(device: torch.device, dtype: torch.dtype) -> type[LayerMaps]:
    """Return the class of a layer's maps: with kernels on a GPU that runs them, for rows in float32; else plain."""
    if device.type != "cuda" or dtype != torch.float32 or why_not_triton(device, dtype) is not None:
        return LayerMaps
    from .fused import FusedMaps  # needs Triton

    return FusedMaps


class LayerStack:
    """The layers up to ``end`` as the first ``n`` positions of one prompt pass them; read at the last of these."""

    def __init__(
        self,
        adapter: Adapter,
        trace: Trace,
        prompt: int,
        n: int,
        end: int,
        dtype: torch.dtype,
        compute: torch.dtype,
    ) -> None:
        self.adapter, self.trace, self.n, self.end = adapter, trace, n, end
        self.dtype, self.compute = dtype, compute
        first = trace.span(prompt).start
        self.prompt, self.span = prompt, slice(first, first + n)
        self.progress = Parts(1)  # a part per layer, there or back, of the sweep under way
        self._layers: dict[int, Layer] = {}
        self._maps: dict[int, LayerMaps] = {}
        self._keeps = True
        self._reads: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._responses: dict[int, float] = {}

    def layer(self, index: int) -> Layer:
        layer = self._layers.get(index)
        if layer is None:
            layer = self.adapter.layer(index)
            if layer.is_own:  # weights that are computed are not to be held of every layer
                self._layers[index] = layer
        return layer

    def queries(self, index: int) -> slice:
        """Return the positions where a layer is needed: all, but in the last one only the position that is read."""
        return slice(self.n - 1 if index == self.end - 1 else 0, self.n)

    def maps(self, index: int) -> LayerMaps:
        """Return the maps of a layer. They are kept where that costs little: no copy of weights, few probabilities."""
        if index in self._maps:
            return self._maps[index]
        layer = self.layer(index)
        make = maps_class(layer.device, self.dtype)
        maps = make(layer, self.trace.layers[index], self.span, self.queries(index), self.dtype, self.compute)
        probabilities = self.end * layer.attention.n_heads * self.n**2
        if self._keeps and maps.borrows and probabilities <= KEPT:
            self._maps[index] = maps
        return maps

    def release(self) -> None:
        """Keep no maps from now on, as memory is short."""
        self._maps, self._keeps = {}, False

    def reading(self, index: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return s (N,) and γ (D,), or None, of the norm before a layer's MLP.

        Both are in the dtype and on the device of ``like``, the components: they may still be on the layer before.
        """
        if index not in self._reads:
            layer = self.layer(index)
            scale = maps_class(layer.device, self.dtype).scales(
                layer.mlp, self.trace.layers[index].mlp.resid[self.span], self.dtype
            )
            gamma = None if layer.mlp.norm is None else layer.mlp.norm.weight
            self._reads[index] = scale, None if gamma is None else gamma.to(self.dtype)
        scale, gamma = self._reads[index]
        return scale.to(like), None if gamma is None else gamma.to(like)

    def responses(self, indices: Sequence[int]) -> list[float]:
        """Return the root mean square response of each layer's gates to a unit vector.

        s · ‖γ ⊙ X[n, m]‖ times that is the distance from zero at which a component's gates can be expected. Only the
        first call for a layer waits for a device.
        """
        new = [index for index in dict.fromkeys(indices) if index not in self._responses]
        norms, sizes = zip(*map(self._gate_norm, new), strict=True) if new else ((), ())
        for index, norm, size in zip(new, to_host(norms), sizes, strict=True):
            self._responses[index] = float(norm) / size**0.5
        return [self._responses[index] for index in indices]

    def _gate_norm(self, index: int) -> tuple[Tensor, int]:
        """Return the norm of a layer's gate weights, (), and how many numbers they are."""
        layer = self.layer(index)
        gates = [layer.mlps[part.part].w_gate for part in self.trace.layers[index].mlps]
        wide = torch.promote_types(gates[0].dtype, torch.float32)
        norms = [torch.linalg.vector_norm(w.detach(), dtype=wide) for w in gates]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        return norm, sum(w.numel() for w in gates)
