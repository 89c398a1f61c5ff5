"""The ledger of a prompt: the gradients of every layer and site, and every component's exact score on demand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from ..adapters import Adapter
from ..components.base import ComponentKind, SeveralLayers
from ..components.custom import Array, Custom, SomeBases, Subspaces
from ..components.features import Features
from ..components.model import Modules, Tokens, Which
from ..inputs.hook_names import Site
from ..options import Options
from ..request import Request, check_end, check_kind, fit, with_trace
from ..results.attribution import Attribution
from ..results.layered import LayeredAttribution
from ..runtime.brief import brief
from ..runtime.dtypes import dtype_name
from ..runtime.memory import readable
from ..runtime.numbers import as_index
from ..runtime.paths import check_path
from ..runtime.terminal import encodable
from ..trace.light import light
from ..trace.record import Trace
from .attribute import read_off, way_back
from .drawn import DrawnLedger
from .given import OWN_KINDS, check_kinds, kinds_there, numbered, place, refuse_both
from .looking import reads_of_looking, worst_miss
from .paged import PagedLedger
from .pages import Pages, Wanted
from .places import Chosen, LayerPlaces, Reading, places_of
from .positions import LedgerAtPositions
from .reads import Reads
from .saved import restore, save
from .steering import Steers
from .view import View

Answer: TypeAlias = Any  # an Attribution or a LayeredAttribution, in lists as the ledger's prompts and positions are
OfKinds: TypeAlias = dict[str, Attribution | LayeredAttribution]
Numbers: TypeAlias = tuple[int, int, int]  # of a prompt, a read and a target, counted from 0
By: TypeAlias = Literal["magnitude", "positive", "negative"]
_KEYS: dict[str, Callable[[Entry], float]] = {
    "magnitude": lambda entry: -abs(entry.score),
    "positive": lambda entry: -entry.score,
    "negative": lambda entry: entry.score,
}


class Entry(NamedTuple):
    """A line of :meth:`Ledger.top`: a component's label and kind, the layer where it starts, and its score."""

    label: str
    kind: str
    layer: int
    score: float


class Ledger(LedgerAtPositions, DrawnLedger, PagedLedger):
    """Exact scores of all components under a linear rule, from one forward and one backward pass.

    It holds the gradient λ of the target at every layer and site, (R, T, D) for R targets and T positions, and the
    trace. A component's score is Σ_n ⟨λ[n], X[n]⟩, whatever it is (DESIGN.md section 8). Every answer is complete: its
    scores, with `rest` and `bias`, sum to the target.

    Answers are what :meth:`depass_fast.DePass.attribute` returns for the same components: an :class:`Attribution`, or a
    :class:`LayeredAttribution` for ``layers``; a list of them for a list of positions; a list of what one prompt gives
    for several prompts. Questions may raise the errors of `attribute`, and ValueError once the model's weights have
    changed.
    """

    def __init__(
        self,
        request: Request,
        reads: Reads,
        pages: Pages,
        one_position: bool,
        looking: Pages | None = None,
        seconds: float | None = None,
    ) -> None:
        self._request, self._reads, self._pages, self._one_position = request, reads, pages, one_position
        self._looking = looking
        self._seconds = time.perf_counter() - request.began if seconds is None else seconds

    @staticmethod
    def of(request: Request, one_position: bool, attention: bool = False) -> Ledger:
        """Take the forward and the backward pass of a request, with the book of ``attention`` if it is wanted.

        Raises:
            MemoryError: they cannot fit.
            ValueError: the queries and keys of the model cannot be made again.
        """
        request = with_trace(fit(request, is_ledger=True, books=1 + attention))
        reads, trace, layers = Reads.of(request), request.require_trace(), range(request.end)
        steers = Steers.of(request.adapter, trace, request.prompts, layers) if attention else None
        pages, looking = way_back(request, reads, Wanted.everything(request.end), steers), None
        if attention:
            count = len(reads.seeds)
            pages, looking = pages.rows(slice(count)), pages.rows(slice(count, None))
        reads.packing.forget()
        return Ledger(replace(request, trace=light(trace)), reads, pages, one_position, looking)

    @property
    def steered(self) -> Ledger:
        """The second book: what the target owes to where heads looked, in the components' shares.

        It answers the same questions as the first. Its scores sum to the credit of all heads behind the components'
        start, see :meth:`depass_fast.DePass.attention_credit`.

        Raises:
            ValueError: the ledger was made without ``attention=True``.
        """
        if self._looking is None:
            raise ValueError("steered: this ledger has no book of attention; make it with ledger(..., attention=True).")
        if self._looking is self._pages:
            return self
        return Ledger(self._request, self._reads, self._looking, self._one_position, self._looking, self._seconds)

    @property
    def _is_steered(self) -> bool:
        return self._looking is self._pages

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the gradients and the scores of heads and neurons. Nothing is pickled.

        :meth:`depass_fast.DePass.load_ledger` reads it.

        Raises:
            ValueError: the model's weights have changed since the ledger was made.
            OSError: there is no such folder (FileNotFoundError), or the file cannot be written.
        """
        check_path(path)
        self._check_weights()
        if self._is_steered:
            raise ValueError("save: this is the second book of a ledger; save the ledger, which holds both.")
        save(path, self._request, self._reads, self._pages, self._one_position, self._looking)

    @staticmethod
    def read(path: str | Path, adapter: Adapter, tokenizer: Any | None, settings: Options) -> Ledger:
        """Return what :meth:`save` wrote, for :meth:`depass_fast.DePass.load_ledger`. Errors as there."""
        return Ledger(*restore(path, adapter, tokenizer, settings))

    # -- questions ------------------------------------------------------------------------------------------------

    def scores(self, components: ComponentKind) -> Answer:
        """Return the scores of any components, as `attribute` takes them."""
        results = self._read_off(components, range(len(self._request.prompts)))
        if self._one_position:
            results = [result for (result,) in results]
        return results if self._request.batch else results[0]

    def _read_off(self, components: ComponentKind, prompts: Sequence[int]) -> list[Any]:
        """Return a list of results, one per position, for each of the ``prompts``."""
        check_kind(components)
        given, adapter = replace(self._request, began=time.perf_counter()), self._request.adapter
        self._check_weights()
        components.check(adapter, [len(ids) for ids in given.prompts])
        for kind in (kinds := components.each(adapter)):
            check_end(kind, adapter, given.end_given)
        request = replace(given, components=components, layer=components.resolve(adapter))
        reads = [self._reads] * len(kinds)
        if self._is_steered:
            reads = [reads_of_looking(self._reads, self._pages, kind.entry(adapter)) for kind in kinds]
        with torch.no_grad():
            return read_off(request, kinds, reads, self._pages, prompts)

    def tokens(self, layer: int | str = 0) -> Answer:
        """Return the scores of the tokens at the input of a layer: what each position's state is worth."""
        return self.scores(Tokens(layer))

    def modules(
        self, layer: int | str | None = None, which: Which = "both", *, layers: SeveralLayers | None = None
    ) -> Answer:
        """Return the scores of whole attentions and MLPs of one layer or several, by default of all."""
        return self.scores(Modules(which=which, **place(layer, layers)))

    def features(
        self,
        sae: Any,
        layer: int | str | None = None,
        site: Site | None = None,
        *,
        layers: SeveralLayers | None = None,
    ) -> Answer:
        """Return the scores of a dictionary's features. Arguments as of :class:`depass_fast.Features`."""
        refuse_both(layer, layers)
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
        kinds: Sequence[str] | None = None,
        by: By = "magnitude",
        prompt: int = 0,
        read: int = 0,
        target: int = 0,
    ) -> list[Entry]:
        """Return the ``k`` leading components over kinds and layers: the tokens at the input, all heads, all neurons.

        They are not parts of one sum: a head's score is a part of what the tokens before it are worth. ``kinds`` are
        some of :attr:`kinds`, by default all but "modules". ``prompt``, ``read`` and ``target`` choose one of several.

        Raises:
            ValueError: a kind that is unknown, or that the model lacks; ``by`` is another word; ``k`` is less than one.
            TypeError: ``k``, ``prompt``, ``read`` or ``target`` is no integer.
            IndexError: there is no such prompt, read or target.
        """
        kinds = [kind for kind in self.kinds if kind != "modules"] if kinds is None else kinds
        self._check(kinds, prompt, read, target, k=k)
        if by not in _KEYS:
            raise ValueError(f"by: {by!r} is not one of {', '.join(map(repr, _KEYS))}.")
        found: list[Entry] = []
        for kind, result in self._results(kinds, prompt, read).items():
            for one in result if isinstance(result, LayeredAttribution) else [result]:
                found += [Entry(label, kind, one.layer, score) for label, score in one.top(k, target, by)]
        return sorted(found, key=_KEYS[by])[:k]

    def view(
        self, top: int = 5, *, kinds: Sequence[str] | None = None, prompt: int = 0, read: int = 0, target: int = 0
    ) -> View:
        """Return the ``top`` leading components of every kind, for ``print`` and ``rich.print``.

        ``str(ledger)`` is that of the first prompt, read and target. Tokens behind the position that is read have no
        rows. ``kinds`` are by default all of :attr:`kinds`. Arguments and errors as of :meth:`top`.
        """
        prompt, read, target = self._check(kinds, prompt, read, target, top=top)
        about = *self._others(prompt, read, target), self._about()
        return View(self._results(kinds, prompt, read), target, top, about)

    def to_dict(
        self, *, kinds: Sequence[str] | None = None, prompt: int | None = None, read: int | None = None
    ) -> dict[str, Any]:
        """Return plain Python values: ``rule``, what the kinds share, and the labels and scores of each kind.

        The names are those of :meth:`Attribution.to_dict`. A kind holds ``layers``, a list, where it is of several
        layers. ``kinds``: all of them. ``prompt`` and ``read`` choose one of several, and are needed there.

        Raises:
            ValueError: as of :meth:`top`; ``prompt`` or ``read`` is needed and was not given.
            IndexError: there is no such prompt or read.
        """
        for name, given, count in (("prompt", prompt, len(self._request.prompts)), ("read", read, self.n_reads)):
            if given is None and count > 1:
                raise ValueError(f"{name}: this ledger holds {count}; choose one, from 0 to {count - 1}.")
        self._check(kinds, prompt or 0, read or 0)
        each = {kind: one.to_dict() for kind, one in self._results(kinds, prompt or 0, read or 0).items()}
        own = ("components", "allocation", "layer", "layers", "site", "labels", "scores", "exclude_special", "seconds")
        own += ("temperature", "verification", "estimate", "sweep", "reduced", "end")  # none of which there is
        shared = {name: value for one in each.values() for name, value in one.items() if name not in own}
        parts = {kind: {name: one[name] for name in own[2:7] if name in one} for kind, one in each.items()}
        return {"rule": self.rule, **shared, "completeness_error": self.completeness_error, **parts}

    def places(self, trace: Trace, chosen: Chosen) -> tuple[list[LayerPlaces], list[Reading]]:
        """Return the shares of one prompt by position, see :func:`places_of`; ``trace`` is the whole one."""
        return places_of(self._request, self._pages, trace, chosen)

    def _results(self, kinds: Sequence[str] | None, prompt: int, read: int) -> OfKinds:
        """Return the answers for some of the model's own kinds, or all, for one prompt and read, which were checked."""
        prompt, given = prompt % len(self._request.prompts), self.kinds if kinds is None else kinds
        return {kind: self._read_off(OWN_KINDS[kind], [prompt])[0][read] for kind in given}

    def _check(self, kinds: Sequence[str] | None, prompt: int, read: int, target: int = 0, **counts: int) -> Numbers:
        """Return ``prompt``, ``read`` and ``target`` counted from 0; ``counts`` are numbers of components.

        Raises:
            ValueError, TypeError, IndexError: as of :meth:`top`.
        """
        check_kinds(self.kinds if kinds is None else kinds, self._request.adapter)
        for name, given in counts.items():
            if as_index(given, name) < 1:
                raise ValueError(f"{name}: {given} is out of range; it must be at least 1.")
        prompt = numbered(prompt, "prompt", len(self._request.prompts))
        read = numbered(read, "read", self.n_reads)
        return prompt, read, numbered(target, "target", len(self.target_names[prompt * self.n_reads + read]))

    def _others(self, prompt: int, read: int, target: int) -> list[str]:
        """Return a line that says which of several prompts, reads and targets a view shows, if there are several."""
        counts = len(self._request.prompts), self.n_reads, len(self.target_names[prompt * self.n_reads + read])
        chosen = zip(("prompt", "read", "target"), (prompt, read, target), counts, strict=True)
        several = [f"{name} {number} of {count}" for name, number, count in chosen if count > 1]
        return [f"{', '.join(several)}; view(prompt=, read=, target=) shows others"] if several else []

    def _about(self) -> str:
        adapter, name = self._request.adapter, "credit of attention" if self._is_steered else "ledger"
        return (
            f"{name} | {self.rule} | {adapter.device}, {dtype_name(adapter.dtype)} | "
            f"completeness error {self.completeness_error:.1e} | {self._seconds:.2f} s"
        )

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def kinds(self) -> tuple[str, ...]:
        """The model's own kinds of components: "tokens", "modules", and "heads" and "neurons" if any layer has them."""
        return kinds_there(self._request.adapter)

    @property
    def rule(self) -> str:
        """The linear rule."""
        return self._request.run.allocation.name

    @property
    def n_reads(self) -> int:
        """The number of positions that are read in every prompt."""
        return len(self._request.reads[0])

    @property
    def target_names(self) -> list[list[str]]:
        """The names of the targets at every place that is read, prompt by prompt."""
        return [list(one.names) for one in self._reads.readout.directions]

    @property
    def completeness_error(self) -> float:
        """The largest |Σ_m score - logit| over all sites, relative to the products that the logit is the sum of.

        Of the second book, |Σ_m score - credit|, relative to the sum of the heads' amounts.
        """
        if self._is_steered:
            return worst_miss(self._pages)
        readout, each = self._reads.readout, []
        for site, total in self._pages.totals.items():
            found = total + self._pages.constants[site] + self._reads.constants
            for (prompt, _), rows, logits, sizes in zip(
                readout.places, self._reads.rows, readout.logits, readout.sizes, strict=True
            ):
                each.append(((found[rows, prompt] - logits).abs() / sizes).max())
        return float(torch.stack(each).max())  # NaN, where there is any

    def _check_weights(self) -> None:
        """Raise ValueError if the model's weights have changed since the ledger was made."""
        try:
            self._request.require_trace().source.check(self._request.adapter.model)
        except ValueError as error:
            raise ValueError("ledger: the model's weights have changed since it was made; make it again.") from error

    @property
    def nbytes(self) -> int:
        """The bytes of the gradients and of the hidden states that it holds."""
        trace = self._request.require_trace()
        states = [
            trace.resid_final,
            trace.normed_final,
            *(x for one in trace.layers for x in (one.resid_pre, one.resid_mid)),
        ]
        books = [self._pages] + ([] if self._looking is None else [self._looking])
        held = {one.data_ptr(): one for one in (*(x for book in books for x in book.gradients.values()), *states)}
        return sum(one.numel() * one.element_size() for one in held.values())

    def __reduce__(self) -> Any:
        raise TypeError(
            "Ledger: it belongs to a model, and is neither pickled nor copied. save(path) writes a file, and "
            "load_ledger(path) of the model's DePass reads it."
        )

    def __str__(self) -> str:
        return str(self.view())

    def __rich__(self) -> View:
        return self.view()

    def __repr__(self) -> str:
        lengths = brief([len(ids) for ids in self._request.prompts])
        return encodable(
            f"Ledger({self.rule}, prompts of {lengths} tokens, targets {brief(self.target_names[0])}, "
            f"{len(self._pages.gradients)} sites, {readable(self.nbytes)})"
        )
