"""A run that is read again: its rows, its failures, and the mean of every component over the prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.extras import needed
from . import manifest as manifests
from .dense import DenseScores, read_dense
from .folder import DENSE, ERRORS, SCORES, prompts_of, read_shard, shards
from .rows import EXTRAS, empty_table

if TYPE_CHECKING:
    import pandas
    import pyarrow
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports] (the extra `plot`)

TOP = 10  # components of a prompt that count as leading
_KEYS = ("target_number", "layer", "component", "label")


@dataclass(frozen=True)
class Sweep:
    """A folder of :meth:`depass_fast.DePass.sweep_to`, finished or under way. Nothing of it is held in memory.

    ``manifest`` says what was computed, with what, of which model and data.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Sweep:
        """Open a run's folder.

        Raises:
            FileNotFoundError, ValueError: it holds no run, or a damaged one.
            ImportError: pyarrow is not installed.
        """
        needed("pyarrow", "sweep: shards are Parquet files", "sweep")
        path = Path(folder).expanduser()
        return cls(path, manifests.read(path))

    def __repr__(self) -> str:
        return (
            f"Sweep({str(self.folder)!r}: {self.manifest['components']['kind']}, {self.n_done:,} of "
            f"{self.n_prompts:,} prompts done, {self.n_failed:,} of them failed)"
        )

    @property
    def n_prompts(self) -> int:
        """The number of prompts of the data."""
        return self.manifest["data"]["prompts"]

    @property
    def n_done(self) -> int:
        """The number of prompts that are finished or failed."""
        return len(prompts_of(self.folder, SCORES, ERRORS))

    @property
    def n_failed(self) -> int:
        """The number of prompts that failed."""
        return len(prompts_of(self.folder, ERRORS))

    @property
    def is_complete(self) -> bool:
        """True if no prompt is left to do."""
        return self.n_done == self.n_prompts

    def to_arrow(self) -> pyarrow.Table:
        """Return all rows as an Arrow table; its columns are those of docs/scale.md."""
        import pyarrow

        tables = list(self._tables())
        return pyarrow.concat_tables(tables).unify_dictionaries() if tables else empty_table()

    def to_pandas(self) -> pandas.DataFrame:
        """Return all rows as a DataFrame. Its ``attrs`` are the manifest. Needs pandas."""
        needed("pandas", "to_pandas", "pandas")
        frame = self.to_arrow().to_pandas()
        frame.attrs.update(self.manifest)
        return frame

    def errors(self) -> pandas.DataFrame:
        """Return the failed prompts: `prompt`, `error`, `reason`. Needs pandas."""
        needed("pandas", "errors", "pandas")
        import pandas

        tables = [read_shard(path).to_pandas() for path in shards(self.folder, ERRORS)]
        names = ["prompt", "error", "reason"]
        return pandas.concat(tables, ignore_index=True) if tables else pandas.DataFrame(columns=names)

    def commonest_reason(self) -> str | None:
        """Return the reason that most of the failed prompts have; None where none failed."""
        reasons = Counter(
            name for path in shards(self.folder, ERRORS) for name in read_shard(path)["reason"].to_pylist()
        )
        return reasons.most_common(1)[0][0] if reasons else None

    def dense(self) -> Iterator[DenseScores]:
        """Yield all scores of every result, where the run wrote them (``dense=True``); a shard at a time is read.

        Raises:
            ValueError: the run did not write them.
        """
        if not self.manifest["output"]["dense"]:
            raise ValueError("dense: this run wrote no dense scores; run it with dense=True.")
        return read_dense(shards(self.folder, DENSE))

    def mean(self, top: int = TOP) -> pandas.DataFrame:
        """Return a row per target, layer and component over all prompts. Needs pandas.

        Its columns: `results`, how many there are of the target; `n`, how many of these have a row for the component;
        `mean` and `standard_error` of its scores over the n (the latter NaN for one); `mean_magnitude`; `top`, in how
        many it is among the ``top`` largest by magnitude. Where a run kept only the leading components, and for tokens,
        n is smaller than the number of results.
        """
        needed("pandas", "mean", "pandas")
        import pandas

        found: pandas.DataFrame | None = None
        results: Counter[int] = Counter()
        for table in self._tables():
            frame = table.to_pandas()
            results.update(_results(frame))
            part = _sums(frame, top)
            found = part if found is None else found.add(part, fill_value=0)
        if found is None:
            names = ["results", "n", "mean", "standard_error", "mean_magnitude", "top"]
            return pandas.DataFrame(columns=[*_KEYS, *names])
        means = _means(found)
        means.insert(len(_KEYS), "results", means["target_number"].map(results))
        return means

    def top(self, k: int = 20, target: int = 0) -> list[tuple[str, float]]:
        """Return the ``k`` leading components as (label, mean), see :meth:`leading`."""
        frame = self.mean()
        of_target: Any = frame[frame["target_number"] == target]
        shown = self.leading(of_target, k)
        return list(shown[["label", "mean"]].itertuples(index=False, name=None))

    def plot(self, ax: Axes | None = None, *, top: int = 20, target: int = 0, width: str | float = "column") -> Axes:
        """Draw the ``top`` leading components' means as bars with standard errors; return the matplotlib Axes.

        ``width`` is "column" (3.3 inches), "page" (6.8) or a number of inches, of the figure that is made where ``ax``
        is None. An unfinished run says so in the picture. Needs pandas and matplotlib.

        Raises:
            ImportError: one of them is not installed.
            ValueError: the target has no rows.
        """
        from .plot import draw_means

        needed("matplotlib", "plot", "plot")
        frame = self.mean()
        of_target: Any = frame[frame["target_number"] == target]
        if not len(of_target):
            raise ValueError(f"plot: there is no row of target {target} yet.")
        return draw_means(self.leading(of_target, top), self, ax, width)

    @staticmethod
    def leading(frame: pandas.DataFrame, k: int = 20) -> pandas.DataFrame:
        """Return the ``k`` rows of :meth:`mean` with the largest sums over all results; `rest` and the like are none.

        A component that few results list does not lead by the few.
        """
        named: Any = frame[~frame["component"].isin(EXTRAS)]
        sums: Any = named["mean"] * named["n"]
        return named.loc[sums.abs().sort_values(ascending=False, kind="stable").index[:k]]

    def _tables(self) -> Iterator[pyarrow.Table]:
        return (read_shard(path) for path in shards(self.folder, SCORES))


def _sums(frame: pandas.DataFrame, top: int) -> pandas.DataFrame:
    """Return the sums of a shard that means are made of; a prompt is in one shard only."""
    score: Any = frame["score"].astype(np.float64)
    result = [frame[name] for name in ("prompt", "target_number", "position")]
    sizes: Any = score.abs().where(~frame["component"].isin(EXTRAS))
    rank = sizes.groupby(result, observed=True).rank(method="first", ascending=False)
    values = {"n": 1, "sum": score, "squares": score**2, "magnitude": score.abs(), "top": (rank <= top).astype(int)}
    return frame[list(_KEYS)].assign(**values).groupby(list(_KEYS), observed=True, sort=True).sum()


def _results(frame: pandas.DataFrame) -> dict[int, int]:
    """Return how many results there are of every target in the list of a prompt's targets."""
    each: Any = frame[["prompt", "target_number", "position"]].drop_duplicates()
    return each["target_number"].value_counts().to_dict()


def _means(sums: pandas.DataFrame) -> pandas.DataFrame:
    n, mean = sums["n"], sums["sum"] / sums["n"]
    spread = (sums["squares"] - n * mean**2).clip(lower=0) / (n - 1).where(n > 1)
    columns = {
        "n": n.astype(int),
        "mean": mean,
        "standard_error": (spread / n) ** 0.5,
        "mean_magnitude": sums["magnitude"] / n,
        "top": sums["top"].astype(int),
    }
    return sums[[]].assign(**columns).reset_index()
