"""The results of a way back, site by site, and which of them are wanted."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..components.base import Entry
from ..runtime.transfer import to_host


@dataclass(frozen=True)
class Wanted:
    """The questions to a way back: gradients and totals at ``sites`` (None: at all), scores of layers.

    The way ends at ``last``, the first site of the model that anything is asked of.
    """

    sites: frozenset[Entry] | None
    neurons: frozenset[int]
    heads: frozenset[int]
    last: Entry

    @staticmethod
    def everything(n_layers: int) -> Wanted:
        """All that there is, of all layers."""
        layers = frozenset(range(n_layers))
        return Wanted(None, layers, layers, Entry(0, "resid_pre"))

    def keeps(self, site: Entry) -> bool:
        return self.sites is None or site in self.sites


@dataclass
class Pages:
    """The findings of a way back, for R rows (a read and a target) of P prompts with T packed positions.

    All but the gradients is in host memory once the way is done.

    gradients: λ (R, T, D) of the sites that were asked for.
    totals, constants: of every site passed, (R, P): Σ_n ⟨λ[n], x[n]⟩, and what all constants behind it are worth.
    changes, sizes: in the book of attention, of every site passed, (R, P): the credit of all looking behind it, and the
    sum of its heads' amounts.
    off: in the book of attention, how far queries and keys are from those recorded, relatively.
    neurons, heads: of a layer, the scores (R, P, I) for each of its MLPs, and (R, P, H).
    of_attention, of_mlp: what the constants in a layer's own outputs are worth, (R, P).
    embedded: what later layers embed at every position is worth, (R, T), where there is such. For tokens at layer 0 it
    is theirs; for all others it is among the constants.
    """

    gradients: dict[Entry, Tensor] = field(default_factory=dict)
    totals: dict[Entry, Tensor] = field(default_factory=dict)
    constants: dict[Entry, Tensor] = field(default_factory=dict)
    changes: dict[Entry, Tensor] = field(default_factory=dict)
    sizes: dict[Entry, Tensor] = field(default_factory=dict)
    neurons: dict[int, list[Tensor]] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)
    of_attention: dict[int, Tensor] = field(default_factory=dict)
    of_mlp: dict[int, Tensor] = field(default_factory=dict)
    embedded: Tensor | None = None
    off: float = 0.0

    def brought_home(self) -> Pages:
        """Return the same with all but the gradients in host memory, in one copy."""
        names = ("totals", "constants", "changes", "sizes", "heads", "of_attention", "of_mlp")
        each = [getattr(self, name) for name in names]
        parts = [list(held.values()) for held in each] + list(self.neurons.values())
        parts.append([] if self.embedded is None else [self.embedded])
        home = iter(to_host([one for part in parts for one in part]))
        moved = [{key: next(home) for key in held} for held in each]
        neurons = {layer: [next(home) for _ in of_layer] for layer, of_layer in self.neurons.items()}
        more = {"neurons": neurons, "embedded": next(home, None), "off": self.off}
        return Pages(self.gradients, **dict(zip(names, moved, strict=True)), **more)

    def rows(self, some: slice) -> Pages:
        """Return the same for some of the rows. What only the book of attention has is left as it is."""
        parts = {name: {key: one[some] for key, one in getattr(self, name).items()} for name in _BY_ROW}
        neurons = {layer: [one[some] for one in of_layer] for layer, of_layer in self.neurons.items()}
        embedded = None if self.embedded is None else self.embedded[some]
        return Pages(**parts, neurons=neurons, changes=self.changes, sizes=self.sizes, embedded=embedded, off=self.off)


_BY_ROW = ("gradients", "totals", "constants", "heads", "of_attention", "of_mlp")
