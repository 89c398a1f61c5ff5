"""The kinds of a model's layers, by its family's declaration: what they have, and what needs them to be plain."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .beyond import BEYOND_ONE_NORM, ROUTED_HEADS, beyond_plain, named
from .ends import ModelEnds
from .experts import has_router
from .family import Family
from .looked_up import once
from .maps import Norm
from .paths import below
from .streams import Streams


@dataclass(frozen=True)
class LayerKinds(ModelEnds):
    """A model and the declaration of each of its layers."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The modules of the layers."""
        return once(self, ("blocks",), lambda: self._below_model(self.family.layers))

    @property
    def n_layers(self) -> int:
        return len(self.blocks) if self.family.homes is None else len(self.family.homes)

    @property
    def is_parallel(self) -> bool:
        """True if the MLP of a layer reads the same residual stream as its attention."""
        return self.family.parallel

    def block(self, index: int) -> nn.Module:
        """The module of layer ``index``."""
        block = self.blocks._modules[str(self.home(index))]
        assert block is not None
        return block

    def home(self, index: int) -> int:
        """The number of the module of layer ``index``: several layers may be in one."""
        return index if self.family.homes is None else self.family.homes[index]

    def added_to(self, index: int, part: str) -> nn.Sequential | None:
        """The adapter of layer ``index`` whose output is added to that of a ``part``, a projection; None: none is."""
        path = {"v_proj": self.kind(index).v_adapter, "gate_proj": self.kind(index).gate_adapter}.get(part)
        return None if path is None else below(self.block(index), path)

    def kind(self, index: int) -> Family:
        """The declaration of layer ``index``, in families whose layers are of several kinds; else that of all."""
        kinds = self.family.kinds
        return self.family if kinds is None else kinds[index]

    def streams(self, index: int) -> Streams:
        """The way of layer ``index`` with several residual streams, in a model that has them."""
        streams = self.kind(index).streams
        assert streams is not None
        return streams

    def is_mixture(self, index: int) -> bool:
        """True if the MLP of layer ``index`` is a mixture of experts."""
        declared = self.kind(index).experts
        return declared is not None and has_router(self.block(index), declared)

    def has_dense_mlp(self, index: int) -> bool:
        """True if layer ``index`` has an MLP that is no mixture, beside one or alone."""
        declared = self.kind(index).experts
        beside = declared is not None and (declared.beside is not None or declared.ahead)
        return self.has_mlp(index) and (beside or not self.is_mixture(index))

    def has_attention(self, index: int) -> bool:
        """True if layer ``index`` mixes positions: it has attention or a recurrence."""
        return self.kind(index).attention is not None

    def has_mlp(self, index: int) -> bool:
        """True if layer ``index`` has an MLP or experts."""
        return self.kind(index).mlp is not None

    @property
    def _every_kind(self) -> tuple[Family, ...]:
        return (self.family,) if self.family.kinds is None else self.family.kinds

    @property
    def is_uniform(self) -> bool:
        """True if every layer is plain softmax attention, nothing between its heads and `o_proj`, and then an MLP."""
        return not self.beyond_plain

    @property
    def mixes_plainly(self) -> bool:
        """True if every layer is that, except that a router may choose a position's heads."""
        return set(self.beyond_plain) <= {ROUTED_HEADS}

    @property
    def beyond_plain(self) -> list[str]:
        """All that layers have beyond plain softmax attention and then an MLP, in words."""
        return beyond_plain(self._every_kind)

    @property
    def beyond_one_norm(self) -> list[str]:
        """All that layers have beside one norm in front of attention and one in front of the MLP, in words."""
        return named(self._every_kind, BEYOND_ONE_NORM)

    def check_uniform(self, what: str, advice: str = "", routed_heads: bool = False) -> None:
        """Raise ValueError unless the model :attr:`is_uniform`, or :attr:`mixes_plainly`, as ``what`` needs."""
        if not (self.mixes_plainly if routed_heads else self.is_uniform):
            found = ", ".join(one for one in self.beyond_plain if not (routed_heads and one == ROUTED_HEADS))
            raise ValueError(
                f"{what} is for models whose layers are all softmax attention and MLP; it does not know all that this "
                f"one has: {found}.{advice}"
            )

    def check_one_norm(self, what: str) -> None:
        """Raise ValueError if layers have something :attr:`beyond_one_norm`, which ``what`` does not know."""
        if self.beyond_one_norm:
            found = ", ".join(self.beyond_one_norm)
            raise ValueError(f"{what} does not know all that this model has: {found}. dp.ledger and dp.attribute do.")

    def has_mixers(self) -> bool:
        """True if any layer mixes positions by a recurrence."""
        return any(self.kind(index).mixer is not None for index in range(self.n_layers))

    def has_keyed(self) -> bool:
        """True if the values of any layer are its keys."""
        return any(self.kind(index).keyed is not None for index in range(self.n_layers))

    def spreads(self, index: int) -> bool:
        """True if what a branch of layer ``index`` writes reaches later positions, too."""
        return self.kind(index).attention_conv is not None or self.kind(index).mlp_conv is not None

    @property
    def experts_per_position(self) -> int:
        """The number of experts that a router sends a position to; 0 in a model without mixtures."""
        every = [self.family, *(self.family.kinds or ())]
        return next((kind.experts.top_k for kind in every if kind.experts is not None), 0)

    @property
    def giving_back(self) -> int:
        """The number of a router's choices that stand for an expert which gives back what it reads (LongCat)."""
        every = [self.family, *(self.family.kinds or ())]
        return next((kind.experts.gives_back for kind in every if kind.experts is not None), 0)

    @property
    def weighs_inputs(self) -> bool:
        """True if a router's weights multiply what its experts read (Llama 4)."""
        every = [self.family, *(self.family.kinds or ())]
        return any(kind.experts is not None and kind.experts.weighs_input for kind in every)

    def stream_norms(self) -> list[tuple[nn.Module, Norm]]:
        """Every norm inside of what reads several residual streams, that a float64 model computes in float32."""
        streams = self.family.streams
        return [] if streams is None else streams.own_norms(self.decoder, list(self.blocks))

    def embeddings_of(self, index: int) -> nn.Module | None:
        """The module that adds layer ``index``'s own embeddings to the streams behind the layer before; None without.

        Those of layer 0 are a part of what enters the model.
        """
        streams = self.family.streams
        return None if streams is None or not 0 < index < self.n_layers else streams.enters(self.block(index))

    @property
    def end_module(self) -> nn.Module:
        """The module whose output the unembedding reads, in a model without a final norm."""
        streams, last = self.family.streams, self.blocks[-1]
        return last if streams is None else streams.end(self.decoder, last)[0]

    def activates_values(self, index: int) -> bool:
        """True if the values of layer ``index`` pass an activation."""
        mixer = self.kind(index).mixer
        return mixer is not None and mixer.value_ratio is not None

    @property
    def selects(self) -> int | None:
        """The most keys that a query sees, where an indexer selects them (sparse attention); None where none does."""
        return next((kind.selects for kind in self.family.kinds or (self.family,) if kind.selects is not None), None)

    def check_selects_nothing(self, what: str) -> None:
        """Raise ValueError for sparse attention, which ``what`` does not know."""
        if self.selects is not None:
            raise ValueError(f"{what} does not know sparse attention, where an indexer selects the keys of a query.")
