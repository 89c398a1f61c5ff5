"""The ledger of a prompt: the gradients of every layer and site, and every component's exact score on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from ..adapters import Adapter
from ..components.base import ComponentKind, SeveralLayers
from ..components.custom import Array, Custom, SomeBases, Subspaces
from ..components.features import Features
from ..components.model import Heads, Modules, Neurons, Tokens, Which
from ..inputs.hook_names import Site
from ..options import Options
from ..request import Request, check_end, check_kind, fit, with_trace
from ..results.attribution import Attribution
from ..results.layered import LayeredAttribution
from ..runtime.brief import brief
from ..runtime.memory import readable
from ..runtime.terminal import encodable
from .attribute import read_off, way_back
from .reads import Reads
from .saved import restore, save
from .walk import Pages, Wanted

Answer: TypeAlias = Any  # an Attribution or a LayeredAttribution, in lists as the ledger's prompts and positions are
By: TypeAlias = Literal["magnitude", "positive", "negative"]
KINDS = ("tokens", "modules", "heads", "neurons")


class Entry(NamedTuple):
    """A line of :meth:`Ledger.top`: a component's label and kind, the layer where it starts, and its score."""

    label: str
    kind: str
    layer: int
    score: float


class Ledger:
    """Exact scores of all components under a linear rule, from one forward and one backward pass.

    It holds the gradient λ of the target at every layer and site, (R, T, D) for R targets and T positions, and the
    trace. A component's score is Σ_n ⟨λ[n], X[n]⟩, whatever it is (DESIGN.md section 8). Every answer is complete: its
    scores, with `rest` and `bias`, sum to the target.

    Answers are what :meth:`depass_fast.DePass.attribute` returns for the same components: an :class:`Attribution`, or a
    :class:`LayeredAttribution` for ``layers``; a list of them for a list of positions; a list of what one prompt gives
    for several prompts. Questions may raise the errors of `attribute`, and ValueError once the model's weights have
    changed.
    """

    def __init__(self, request: Request, reads: Reads, pages: Pages, one_position: bool) -> None:
        self._request, self._reads, self._pages, self._one_position = request, reads, pages, one_position

    @staticmethod
    def of(request: Request, one_position: bool) -> Ledger:
        """Take the forward and the backward pass of a request. Raises MemoryError where they cannot fit."""
        request = with_trace(fit(request, is_ledger=True))
        reads = Reads.of(request)
        return Ledger(request, reads, way_back(request, reads, Wanted.everything(request.end)), one_position)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the gradients and the scores of heads and neurons. Nothing is pickled.

        :meth:`depass_fast.DePass.load_ledger` reads it.
        """
        save(path, self._request, self._reads, self._pages, self._one_position)

    @staticmethod
    def read(path: str | Path, adapter: Adapter, tokenizer: Any | None, settings: Options) -> Ledger:
        """Return what :meth:`save` wrote, for :meth:`depass_fast.DePass.load_ledger`. Errors as there."""
        return Ledger(*restore(path, adapter, tokenizer, settings))

    # -- questions ------------------------------------------------------------------------------------------------

    def scores(self, components: ComponentKind) -> Answer:
        """Return the scores of any components, as `attribute` takes them."""
        check_kind(components)
        given, adapter = self._request, self._request.adapter
        given.require_trace().source.check(adapter.model)
        components.check(adapter, [len(ids) for ids in given.prompts])
        kinds = components.each(adapter)
        for kind in kinds:
            check_end(kind, adapter, given.end_given)
        request = replace(given, components=components, layer=components.resolve(adapter))
        with torch.no_grad():
            results: list[Any] = read_off(request, kinds, self._reads, self._pages)
        if self._one_position:
            results = [result for (result,) in results]
        return results if given.batch else results[0]

    def tokens(self, layer: int | str = 0) -> Answer:
        """Return the scores of the tokens at the input of a layer: what each position's state is worth."""
        return self.scores(Tokens(layer))

    def heads(self, layer: int | str | None = None, *, layers: SeveralLayers = "all") -> Answer:
        """Return the scores of the attention heads of one layer or several, by default of all."""
        return self.scores(Heads(layers=layers) if layer is None else Heads(layer))

    def neurons(self, layer: int | str | None = None, *, layers: SeveralLayers = "all") -> Answer:
        """Return the scores of the MLP's neurons of one layer or several, by default of all."""
        return self.scores(Neurons(layers=layers) if layer is None else Neurons(layer))

    def modules(
        self, layer: int | str | None = None, which: Which = "both", *, layers: SeveralLayers = "all"
    ) -> Answer:
        """Return the scores of whole attentions and MLPs of one layer or several, by default of all."""
        return self.scores(Modules(which=which, layers=layers) if layer is None else Modules(layer, which))

    def features(
        self,
        sae: Any,
        layer: int | str | None = None,
        site: Site | None = None,
        *,
        layers: SeveralLayers | None = None,
    ) -> Answer:
        """Return the scores of a dictionary's features. Arguments as of :class:`depass_fast.Features`."""
        return self.scores(Features(layer, sae, site, layers=layers))  # pyright: ignore[reportArgumentType]

    def subspaces(
        self,
        layer: int | str = 0,
        bases: SomeBases = (),
        labels: Sequence[str] | None = None,
        *,
        layers: SeveralLayers | None = None,
    ) -> Answer:
        """Return the scores of projections of a layer's input. Arguments as of :class:`depass_fast.Subspaces`."""
        return self.scores(Subspaces(layer, bases, labels, layers=layers))  # pyright: ignore[reportArgumentType]

    def custom(
        self,
        layer: int | str,
        states: Array | Sequence[Array],
        labels: Sequence[str] | None = None,
        site: Site | None = None,
    ) -> Answer:
        """Return the scores of any vectors (N, M, D). Arguments as of :class:`depass_fast.Custom`."""
        return self.scores(Custom(layer, states, labels, site))

    def top(
        self,
        k: int = 20,
        *,
        kinds: Sequence[str] = ("tokens", "heads", "neurons"),
        by: By = "magnitude",
        prompt: int = 0,
        read: int = 0,
        target: int = 0,
    ) -> list[Entry]:
        """Return the ``k`` leading components over kinds and layers: the tokens at the input, all heads, all neurons.

        They are not parts of one sum: a head's score is a part of what the tokens before it are worth. ``kinds`` may
        also hold "modules". ``prompt``, ``read`` and ``target`` choose one of several.

        Raises:
            ValueError: an unknown kind; ``by`` is another word.
        """
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise ValueError(f"kinds: {unknown[0]!r} is not one of {', '.join(map(repr, KINDS))}.")
        found: list[Entry] = []
        for kind in kinds:
            for result in self._results(kind, prompt, read):
                found += [Entry(label, kind, result.layer, score) for label, score in result.top(k, target, by)]
        keys = {"magnitude": lambda e: -abs(e.score), "positive": lambda e: -e.score, "negative": lambda e: e.score}
        return sorted(found, key=keys[by])[:k]

    def _results(self, kind: str, prompt: int, read: int) -> Iterator[Attribution]:
        """Yield the answers for one of the model's own kinds, layer by layer."""
        answer = self.tokens() if kind == "tokens" else getattr(self, kind)()
        answer = answer[prompt] if self._request.batch else answer
        answer = answer if self._one_position else answer[read]
        yield from answer if isinstance(answer, LayeredAttribution) else [answer]

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def rule(self) -> str:
        """The linear rule."""
        return self._request.run.allocation.name

    @property
    def target_names(self) -> list[list[str]]:
        """The names of the targets at every place that is read, prompt by prompt."""
        return [list(one.names) for one in self._reads.readout.directions]

    @property
    def completeness_error(self) -> float:
        """The largest |Σ_m score - logit| over all sites, relative to the products that the logit is the sum of."""
        readout, worst = self._reads.readout, 0.0
        for site, total in self._pages.totals.items():
            found = total + self._pages.constants[site] + self._reads.constants
            for (prompt, _), rows, logits, sizes in zip(
                readout.places, self._reads.rows, readout.logits, readout.sizes, strict=True
            ):
                worst = max(worst, float(((found[rows, prompt] - logits).abs() / sizes).max()))
        return worst

    @property
    def nbytes(self) -> int:
        """The bytes of the gradients that it holds; the trace has its own."""
        return sum(one.numel() * one.element_size() for one in self._pages.gradients.values())

    def __repr__(self) -> str:
        lengths = brief([len(ids) for ids in self._request.prompts])
        return encodable(
            f"Ledger({self.rule}, prompts of {lengths} tokens, targets {brief(self.target_names[0])}, "
            f"{len(self._pages.gradients)} sites, {readable(self.nbytes)})"
        )
