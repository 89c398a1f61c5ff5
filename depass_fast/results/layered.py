"""The result for several layers: an Attribution of each, and all of them as one table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .attribution import TENSORS, Attribution
from .files import open_saved, write_csv
from .ranking import check_top, ranking
from .verification import Verification, merged

if TYPE_CHECKING:
    import pandas

FORMAT = "depass_fast.layers.v1"


@dataclass(eq=False)
class LayeredAttribution:
    """The shares of every component of several layers in the same targets' logits.

    A layer's shares, its `rest` and its `bias` sum to the logit; shares of different layers are not to be added.
    ``result[3]`` is layer 3's :class:`Attribution`; iterating goes through all of them. What all layers
    share (`target_logits`, `target_names`, `tokens`, `method`, ...) can be read from this object, too.

    ``estimate`` is that of all layers together, see :class:`depass_fast.adjoint.estimate.Estimate`; None where nothing
    was sampled. ``warnings`` says where it is bad, or the verification failed.
    """

    by_layer: list[Attribution]
    estimate: dict[str, Any] | None = None
    warnings: list[str] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("by_layer", "layer_errors"):
            raise AttributeError(name)
        return getattr(self.by_layer[0], name)

    def __iter__(self) -> Iterator[Attribution]:
        return iter(self.by_layer)

    def __len__(self) -> int:
        return len(self.by_layer)

    @property
    def layers(self) -> list[int]:
        """The layers' numbers, as in the rows of :attr:`scores`."""
        return [result.layer for result in self.by_layer]

    def __getitem__(self, layer: int) -> Attribution:
        """One layer's result, by its number. Raises KeyError where it was not asked for."""
        if layer not in self.layers:
            raise KeyError(f"no layer {layer}; this result holds {', '.join(map(str, self.layers))}")
        return self.by_layer[self.layers.index(layer)]

    @property
    def scores(self) -> Tensor:
        """(layers, I), with the targets' axis in front if they were a list; without `rest` and `bias`.

        Raises:
            ValueError: the layers have different numbers of components (in mixtures of experts); see :attr:`by_layer`.
        """
        parts = self._named()
        if len({part.shape[-1] for part in parts}) > 1:
            counts = ", ".join(f"layer {r.layer}: {p.shape[-1]}" for r, p in zip(self.by_layer, parts, strict=True))
            raise ValueError(f"scores: no table, the layers have different numbers of components ({counts}); iterate.")
        return torch.stack(parts, dim=-2)

    def _named(self) -> list[Tensor]:
        return [r.scores[..., : len(r.labels) - r.n_extras] for r in self.by_layer]

    @property
    def rest(self) -> Tensor:
        """Every layer's `rest`: (layers,) or (K, layers)."""
        return self._extra("rest")

    @property
    def bias(self) -> Tensor:
        """Every layer's `bias`, zero where there is none: (layers,) or (K, layers)."""
        return self._extra("bias")

    def _extra(self, label: str) -> Tensor:
        found = [
            r.scores[..., r.labels.index(label)] if label in r.labels[-2:] else torch.zeros_like(r.target_logits)
            for r in self.by_layer
        ]
        return torch.stack(found, dim=-1)

    @property
    def labels(self) -> list[str]:
        """Names in the order of ``scores`` flattened over layers and neurons."""
        return [label for r in self.by_layer for label in r.labels[: len(r.labels) - r.n_extras]]

    @property
    def seconds(self) -> float:
        """Of all layers together: each layer's counts from the beginning of the call."""
        return max(r.seconds for r in self.by_layer)

    @property
    def completeness_error(self) -> float:
        """The largest of the layers'."""
        return max(r.completeness_error for r in self.by_layer)

    @property
    def verification(self) -> Verification | None:
        """Of all layers; None where nothing was verified."""
        return merged(r.verification for r in self.by_layer)

    def top(self, k: int = 10, target: int = 0, by: str = "magnitude") -> list[tuple[str, float]]:
        """The ``k`` leading components of all layers as (label, score), see :meth:`Attribution.top`."""
        check_top(k, by)
        scores = self._of(target)
        order = ranking(scores, by)[:k].tolist()
        labels = self.labels
        return [(labels[i], float(scores[i])) for i in order]

    def score(self, label: str, target: int = 0) -> float:
        """The score of one component by its label."""
        try:
            return float(self._of(target)[self.labels.index(label)])
        except ValueError:
            labels = self.labels
            raise KeyError(f"no component {label!r}; labels run from {labels[0]!r} to {labels[-1]!r}") from None

    def to_dataframe(self) -> pandas.DataFrame:
        """A DataFrame with a row per component, `rest` and `bias` of every layer included: `layer`, `label`, scores."""
        import pandas

        frames = [result.to_dataframe() for result in self.by_layer]
        for frame, layer in zip(frames, self.layers, strict=True):
            frame.insert(0, "layer", layer)
        return pandas.concat(frames, ignore_index=True)

    def to_csv(self, path: str | Path) -> None:
        """The table of :meth:`to_dataframe` as a file."""
        rows = [(r.layer, *row) for r in self.by_layer for row in zip(*r.columns()[1], strict=True)]
        write_csv(path, ["layer", *self.by_layer[0].columns()[0]], rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: those of :meth:`Attribution.to_dict` that all layers share, and ``layers``, a list of them."""
        each = [result.to_dict() for result in self.by_layer]
        own = ("layer", "labels", "scores", "completeness_error", "estimate", "warnings")
        shared = {name: value for name, value in each[0].items() if name not in own}
        return {
            **shared,
            "completeness_error": self.completeness_error,
            "verification": None if self.verification is None else asdict(self.verification),
            "estimate": self.estimate,
            "warnings": self.warnings or [],
            "layers": [{name: one[name] for name in own[:4]} for one in each],
        }

    def save(self, path: str | Path) -> None:
        """Write a safetensors file like :meth:`Attribution.save`; :meth:`Attribution.load` reads both."""
        tensors = {f"{i}.{name}": getattr(r, name).clone() for i, r in enumerate(self.by_layer) for name in TENSORS}
        content = {
            "layers": [result.metadata() for result in self.by_layer],
            "estimate": self.estimate,
            "warnings": self.warnings,
        }
        save_file(tensors, str(path), metadata={"format": FORMAT, "json": json.dumps(content)})

    @classmethod
    def load(cls, path: str | Path) -> LayeredAttribution:
        """Read what :meth:`save` wrote. Raises ValueError where the file is no such."""
        tensors, content = open_saved(path, FORMAT)
        return cls.restore(tensors, content)

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], content: dict[str, Any]) -> LayeredAttribution:
        """From the parts of a file."""
        parts: Sequence[dict[str, Any]] = content["layers"]
        results = [
            Attribution.restore({name: tensors[f"{i}.{name}"] for name in TENSORS}, part)
            for i, part in enumerate(parts)
        ]
        return cls(results, content["estimate"], content["warnings"])

    def __str__(self) -> str:
        from .render import plain

        return plain(self)

    def __rich__(self) -> Any:
        from .render import rich_view

        return rich_view(self)

    def _of(self, target: int) -> Tensor:
        """All scores of a target, one layer after the other."""
        scores = torch.atleast_2d(torch.cat(self._named(), dim=-1))
        if not -len(scores) <= target < len(scores):
            raise IndexError(f"target: {target} is out of range; this result holds {len(scores)}.")
        return scores[target]
