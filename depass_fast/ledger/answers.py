"""The scores of components, read off the pages of a way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import Adapter
from ..adjoint.starts import make_start
from ..components.base import ComponentKind, Entry
from ..components.model import Heads, Modules, Neurons, Tokens
from ..components.outputs import LayerOutputs
from ..labels import BIAS, REST
from ..trace.record import Trace
from .pages import Pages, Wanted


@dataclass(frozen=True)
class Shares:
    """The scores of one prompt's components at one layer, in R rows: ``named`` (R, M), ``rest`` and ``bias`` (R,).

    ``rest`` is None where there is none. ``bias`` is what constants are worth from where the components start on,
    without the readout's; ``has_bias`` says if there is such a component.
    """

    labels: tuple[str, ...]
    named: Tensor
    rest: Tensor | None
    bias: Tensor
    has_bias: bool

    @property
    def all_labels(self) -> list[str]:
        """The labels of :meth:`columns`."""
        return [*self.labels, *([] if self.rest is None else [REST]), *([BIAS] if self.has_bias else [])]

    def columns(self) -> Tensor:
        """Return all scores (R, M'), those of `rest` and `bias` behind the named ones where there are such."""
        extras = [*([] if self.rest is None else [self.rest]), *([self.bias] if self.has_bias else [])]
        return torch.cat([self.named, *(one[:, None].to(self.named) for one in extras)], 1)


def wanted_of(kinds: Sequence[ComponentKind], adapter: Adapter) -> Wanted:
    """Return what a way back has to keep to answer for ``kinds``, each of one layer."""
    sites, neurons, heads, ends = set(), set(), set(), []
    for kind in kinds:
        layer, entry = kind.resolve(adapter), kind.entry(adapter)
        ends.append(entry)
        if _is_of_neurons(kind):
            neurons.add(layer)
            ends.append(Entry(layer, "resid_pre" if adapter.is_parallel else "resid_mid"))
        elif _is_of_heads(kind):
            heads.add(layer)
            ends.append(Entry(layer, "resid_pre"))
        else:
            sites.add(entry)
    return Wanted(frozenset(sites), frozenset(neurons), frozenset(heads), min(ends, key=lambda entry: entry.order))


def shares_of(
    pages: Pages,
    kind: ComponentKind,
    adapter: Adapter,
    trace: Trace,
    prompt: int,
    tokens: Sequence[str],
    meets_bias: bool,
) -> Shares:
    """Return the scores of ``kind``, of one layer, in one prompt with these ``tokens``.

    ``meets_bias`` says that constants are added behind its start.
    """
    entry, layer = kind.entry(adapter), kind.resolve(adapter)
    ahead = pages.constants[entry][:, prompt]
    if _is_of_neurons(kind) or _is_of_heads(kind):
        return _on_the_way(pages, kind, adapter, trace, prompt, meets_bias)
    dtype, span = ahead.dtype, trace.span(prompt)
    gradients = pages.gradients[entry][:, span]  # (R, N, D)
    if isinstance(kind, Tokens):
        named = (gradients * trace.resid(layer)[span].to(gradients)).sum(-1)
        if layer == 0 and pages.embedded is not None:
            later = pages.embedded[:, span]
            named, ahead = named + later.to(named), ahead - later.sum(1)
        later = named.new_zeros(len(named), len(tokens) - named.shape[1])
        return Shares(kind.names(adapter, tokens), torch.cat([named, later], 1), None, ahead, meets_bias)
    start = make_start(kind, adapter, trace, prompt, trace.length(prompt), meets_bias, dtype)
    gradients = gradients.to(start.bias.device)
    rest = None if start.rest is None else _dot(gradients, start.rest)
    bias = _dot(gradients, start.bias) + ahead.to(gradients.device)
    return Shares(start.names, start.named.project(gradients), rest, bias, start.has_bias)


def _on_the_way(
    pages: Pages, kind: ComponentKind, adapter: Adapter, trace: Trace, prompt: int, meets_bias: bool
) -> Shares:
    """Return the scores of heads or neurons, or of all of them as a module: the way back found them."""
    layer, entry = kind.resolve(adapter), kind.entry(adapter)
    if _is_of_heads(kind):
        each, constants = pages.heads[layer][:, prompt], pages.of_attention
    else:
        parts = LayerOutputs(adapter, trace, layer, prompt, pages.constants[entry].dtype).reached()
        each = torch.cat([pages.neurons[layer][part][:, prompt] for part in parts], 1)
        constants = pages.of_mlp
    labels = _neuron_names(adapter, trace, layer, prompt) if isinstance(kind, Neurons) else kind.names(adapter, ())
    named = each.sum(1, keepdim=True) if isinstance(kind, Modules) else each
    rest = pages.totals[entry][:, prompt] - each.sum(1)
    bias = pages.constants[entry][:, prompt]
    if (own := constants.get(layer)) is not None:
        rest, bias = rest - own[:, prompt], bias + own[:, prompt]
    return Shares(labels, named, rest, bias, meets_bias or own is not None)


def _neuron_names(adapter: Adapter, trace: Trace, layer: int, prompt: int) -> tuple[str, ...]:
    return LayerOutputs(adapter, trace, layer, prompt, torch.float32).neuron_names(f"L{layer}")


def _dot(gradients: Tensor, x: Tensor) -> Tensor:
    """Return Σ_n ⟨λ[r, n], x[n]⟩: (R, N, D) and (N, D) -> (R,)."""
    return (gradients * x).sum((1, 2))


def _is_of_neurons(kind: ComponentKind) -> bool:
    """True for neurons, and for an MLP as a whole: the sum of its neurons."""
    return isinstance(kind, Neurons) or (isinstance(kind, Modules) and kind.which == "mlp")


def _is_of_heads(kind: ComponentKind) -> bool:
    """True for heads, and for attention as a whole where it starts: the sum of its heads."""
    return isinstance(kind, Heads) or (isinstance(kind, Modules) and kind.which == "attention")
