"""The result for several layers: an Attribution of each, and all of them as one table."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ..labels import BIAS, REST
from .attribution import PARTS, Attribution, pack, unpack
from .drawn import DrawnLayers
from .estimate import Estimate, estimate_dict
from .files import plain_part, read_result, register_format, restore_part, write_result
from .html import AsPage
from .interface import Row
from .provenance import Provenance
from .ranking import leading, score_of, target_row
from .render import plain, rich_view, short
from .tables import data_frame, write_csv
from .verification import Verification, merge

if TYPE_CHECKING:
    import pandas

FORMAT = "depass_fast.layers.v1"


class _Shared:
    """The fields that all layers of a result share; their attributions are ``by_layer``."""

    by_layer: list[Attribution]

    @property
    def target_logits(self) -> Tensor:
        """The model's own logits of the targets: () or (K,)."""
        return self.by_layer[0].target_logits

    @property
    def target_names(self) -> list[str]:
        """A name per target."""
        return self.by_layer[0].target_names

    @property
    def target_ids(self) -> list[int | None]:
        """A token id per target, None for a vector."""
        return self.by_layer[0].target_ids

    @property
    def contrast_ids(self) -> list[int | None]:
        """The token id that is subtracted from each target, None where none is."""
        return self.by_layer[0].contrast_ids

    @property
    def target_kinds(self) -> list[str] | None:
        """The kind of each target, see Attribution; None in files of version 0.1.0."""
        return self.by_layer[0].target_kinds

    @property
    def input_ids(self) -> list[int]:
        """The prompt's token ids."""
        return self.by_layer[0].input_ids

    @property
    def tokens(self) -> list[str]:
        """The prompt's tokens as text."""
        return self.by_layer[0].tokens

    @property
    def components(self) -> str:
        """The kind of components, such as "neurons"."""
        return self.by_layer[0].components

    @property
    def position(self) -> int:
        """The position that was read."""
        return self.by_layer[0].position

    @property
    def allocation(self) -> str:
        """The rule by which components share an MLP."""
        return self.by_layer[0].allocation

    @property
    def temperature(self) -> float:
        """The temperature of the softmax rule."""
        return self.by_layer[0].temperature

    @property
    def backend(self) -> str:
        """The backend that computed the scores."""
        return self.by_layer[0].backend

    @property
    def device(self) -> str:
        """The device of the model."""
        return self.by_layer[0].device

    @property
    def dtype(self) -> str:
        """The dtype of the model."""
        return self.by_layer[0].dtype

    @property
    def is_exact(self) -> bool:
        """True unless the scores are approximate, see :class:`depass_fast.Attribution`."""
        return self.by_layer[0].is_exact

    @property
    def method(self) -> str:
        """The method: "exact" or "adjoint"."""
        return self.by_layer[0].method

    @property
    def value_activation(self) -> str | None:
        """ "shared" where the allocation shared out the activations of values (recurrent layers), else None."""
        return self.by_layer[0].value_activation

    @property
    def written_at(self) -> list[int] | None:
        """The positions where heads or neurons of a ledger were counted; None: all."""
        return self.by_layer[0].written_at

    @property
    def exclude_special(self) -> list[int] | None:
        """The positions that were kept out of the allocation."""
        return self.by_layer[0].exclude_special

    @property
    def state_dtype(self) -> str | None:
        """The dtype of the component states."""
        return self.by_layer[0].state_dtype

    @property
    def compute_dtype(self) -> str | None:
        """The dtype of the products."""
        return self.by_layer[0].compute_dtype

    @property
    def end(self) -> int | None:
        """The layer whose input was read; None: after the final norm."""
        return self.by_layer[0].end

    @property
    def reduced(self) -> dict[str, Any] | None:
        """The sum or mean of a continuation's tokens, see Attribution; None for other results."""
        return self.by_layer[0].reduced

    @property
    def provenance(self) -> Provenance | None:
        """The model and the packages that made the result."""
        return self.by_layer[0].provenance

    @property
    def memory_budget(self) -> int | None:
        """Bytes of workspace that were used in the end; None: not bounded."""
        return self.by_layer[0].memory_budget


@dataclass(eq=False)
class LayeredAttribution(_Shared, DrawnLayers, AsPage):
    """The shares of every component of several layers in the same targets' logits.

    A layer's shares, its `rest` and its `bias` sum to the logit; shares of different layers are not to be added.
    ``result[3]`` is layer 3's :class:`Attribution`; iterating goes through all of them in the order of :attr:`layers`.

    ``estimate`` (:class:`depass_fast.Estimate`) is that of all layers together; None where nothing was sampled.
    ``warnings`` says where it is bad, or where the verification failed. ``unknown`` holds what a file of a later
    version says besides; it is saved again.
    """

    by_layer: list[Attribution]
    estimate: Estimate | None = None
    warnings: list[str] | None = None
    unknown: dict[str, Any] = field(default_factory=dict, repr=False)

    def __getitem__(self, layer: int) -> Attribution:
        """Return one layer's result, by its number; negative ones count from the last that this result holds.

        Raises:
            KeyError: the layer was not asked for.
            TypeError: ``layer`` is no number.
        """
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise TypeError(f"a layer is named by its number, not by {layer!r}; this result holds {self._held}")
        number = operator.index(layer)
        if -len(self) <= number < 0:
            return self.by_layer[number]
        if number not in self.layers:
            raise KeyError(f"no layer {number}; this result holds {self._held}")
        return self.by_layer[self.layers.index(number)]

    def __contains__(self, layer: object) -> bool:
        """True if this result holds the layer of that number."""
        return layer in self.layers

    def __iter__(self) -> Iterator[Attribution]:
        return iter(self.by_layer)

    def __len__(self) -> int:
        return len(self.by_layer)

    @property
    def layers(self) -> list[int]:
        """The layers' numbers, in the order of the rows of :attr:`scores`."""
        return [result.layer for result in self.by_layer]

    @property
    def layer(self) -> NoReturn:
        """Raises AttributeError: there are several."""
        raise AttributeError(f"layer: this result holds several layers; use .layers, or result[{self.layers[-1]}]")

    @property
    def _held(self) -> str:
        return ", ".join(map(str, self.layers))

    @property
    def scores(self) -> Tensor:
        """The table (layers, I), with the targets' axis in front if they were a list; without `rest` and `bias`.

        Raises:
            ValueError: the layers have different numbers of components (experts, features); see :attr:`by_layer`.
        """
        parts = self._named()
        if len({part.shape[-1] for part in parts}) > 1:
            counts = ", ".join(f"layer {r.layer}: {p.shape[-1]}" for r, p in zip(self.by_layer, parts, strict=True))
            raise ValueError(f"scores: no table, the layers have different numbers of components ({counts}); iterate.")
        return torch.stack(parts, dim=-2)

    def _named(self) -> list[Tensor]:
        """Return every layer's scores without `rest` and `bias`."""
        return [result.scores[..., : len(result.labels) - result.n_extras] for result in self.by_layer]

    @property
    def rest(self) -> Tensor:
        """Every layer's `rest`, zero where there is none: (layers,) or (K, layers)."""
        return self._extra(REST)

    @property
    def bias(self) -> Tensor:
        """Every layer's `bias`, zero where there is none: (layers,) or (K, layers)."""
        return self._extra(BIAS)

    def _extra(self, label: str) -> Tensor:
        found = [
            r.scores[..., r.labels.index(label)] if label in r.labels[-2:] else torch.zeros_like(r.target_logits)
            for r in self.by_layer
        ]
        return torch.stack(found, dim=-1)

    @property
    def labels(self) -> list[str]:
        """Names in the order of ``scores`` flattened over layers and components."""
        return [label for r in self.by_layer for label in r.labels[: len(r.labels) - r.n_extras]]

    @property
    def seconds(self) -> float:
        """Seconds of all layers together: each layer's count from the beginning of the call."""
        return max(result.seconds for result in self.by_layer)

    @property
    def completeness_error(self) -> float:
        """The largest error of a layer."""
        return max(result.completeness_error for result in self.by_layer)

    @property
    def verification(self) -> Verification | None:
        """The verification of all layers together; None where nothing was verified."""
        return merge(result.verification for result in self.by_layer)

    def layer_text(self) -> str:
        """Return the layers in words."""
        return f"layers {self._held}" if len(self) < 5 else f"{len(self)} layers"

    def scores_of(self, target: int) -> Tensor:
        """Return all scores of a target in the order of :attr:`labels`, one layer after the other: (M,).

        Raises IndexError where there is no such target.
        """
        return target_row(torch.cat(self._named(), dim=-1), target)

    def rows(self, target: int, top: int) -> list[Row]:
        """Return the ``top`` leading components of all layers; they have no sum."""
        return [Row(label, score) for label, score in self.top(top, target)]

    def top(self, k: int = 10, target: int = 0, by: str = "magnitude") -> list[tuple[str, float]]:
        """Return the ``k`` leading components of all layers as (label, score), see :meth:`Attribution.top`."""
        return leading(self.labels, self.scores_of(target), k, by)

    def score(self, label: str, target: int = 0) -> float:
        """Return the score of one component by its label; raises KeyError where there is none."""
        return score_of(self.labels, self.scores_of(target), label)

    def to_dataframe(self) -> pandas.DataFrame:
        """Return a DataFrame with a row per component, `rest` and `bias` included: `layer`, `label`, scores.

        Its ``attrs`` are :meth:`how`.
        """
        names, rows = self._table()
        return data_frame(names, rows, self.how())

    def to_csv(self, path: str | Path) -> None:
        """Write the table of :meth:`to_dataframe` as a file."""
        names, rows = self._table()
        write_csv(path, names, rows)

    def _table(self) -> tuple[list[str], list[tuple]]:
        """Return the names of a table's columns, and its rows."""
        rows = [(r.layer, *row) for r in self.by_layer for row in zip(*r.columns()[1], strict=True)]
        return ["layer", *self.by_layer[0].columns()[0]], rows

    def how(self) -> dict[str, Any]:
        """Return plain values that say how the scores were computed, and with which model, see Attribution.how."""
        shared = {name: value for name, value in self.by_layer[0].how().items() if name != "layer"}
        return {"layers": self.layers, **shared, "completeness_error": self.completeness_error}

    def to_dict(self) -> dict[str, Any]:
        """Return the values of :meth:`Attribution.to_dict` that all layers share; ``layers`` lists the others."""
        each = [result.to_dict() for result in self.by_layer]
        own = ("layer", "labels", "scores", "completeness_error")
        shared = {name: value for name, value in each[0].items() if name not in own}
        return {
            **shared,
            "completeness_error": self.completeness_error,
            "verification": None if self.verification is None else asdict(self.verification),
            "estimate": estimate_dict(self.estimate),
            "warnings": self.warnings or [],
            "layers": [{name: one[name] for name in own} for one in each],
        }

    def save(self, path: str | Path) -> None:
        """Write a safetensors file like :meth:`Attribution.save`; :meth:`Attribution.load` reads both."""
        tensors, layers = pack(self.by_layer, self.unknown)
        unknown = {name: value for name, value in self.unknown.items() if not isinstance(value, Tensor)}
        estimate = plain_part(self.estimate, unknown.pop("estimate", None))
        content = {"layers": layers, "estimate": estimate, "warnings": self.warnings}
        write_result(path, FORMAT, tensors, unknown | content)

    @classmethod
    def load(cls, path: str | Path) -> LayeredAttribution:
        """Read what :meth:`save` wrote. Raises ValueError if the file holds no LayeredAttribution."""
        return read_result(path, FORMAT)

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], content: dict[str, Any]) -> LayeredAttribution:
        """Return the result that a file's parts describe; later files have fields that are not known here."""
        unknown = {name: value for name, value in content.items() if name not in ("layers", "estimate", "warnings")}
        estimate, more = restore_part(PARTS["estimate"][1], Estimate, content.get("estimate"))
        unknown |= {"estimate": more} if more else {}
        results, more_tensors = unpack(tensors, content["layers"])
        return cls(results, estimate, content.get("warnings"), unknown | more_tensors)

    def __repr__(self) -> str:
        return short(self)

    def __str__(self) -> str:
        return plain(self)

    def __rich__(self) -> Any:
        return rich_view(self)


def warnings_of_layers(results: Sequence[Attribution]) -> list[str] | None:
    """Return the warnings of all layers, each once."""
    return list(dict.fromkeys(text for result in results for text in result.warnings or [])) or None


register_format(FORMAT, LayeredAttribution.restore)
