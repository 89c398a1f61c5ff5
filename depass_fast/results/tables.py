"""Tables of results: CSV files and pandas DataFrames."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas


def write_csv(path: str | Path, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table with a head."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)


def data_frame(
    names: Sequence[str], rows: Iterable[Sequence[Any]], attrs: Mapping[str, Any] | None = None
) -> pandas.DataFrame:
    """Return a table as a DataFrame; ``attrs`` say what it is of.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise  # pandas is there, and lacks something itself
        raise ImportError(
            "to_dataframe: pandas is not installed; pip install pandas, or pip install 'depass-fast[pandas]'. "
            "Without it, to_csv(path) writes the same table, and to_dict() returns plain values."
        ) from error
    frame = pandas.DataFrame(list(rows), columns=list(names))
    frame.attrs.update(attrs or {})
    return frame


def unique_names(names: Sequence[str], ids: Sequence[Any]) -> list[str]:
    """Return names that differ: one that several have is followed by what its target is, or else by its number."""
    named = [_with_ids(name, of) if names.count(name) > 1 else name for name, of in zip(names, ids, strict=True)]
    return [f"{name} #{named[:i].count(name) + 1}" if named.count(name) > 1 else name for i, name in enumerate(named)]


def _with_ids(name: str, ids: Sequence[int | None]) -> str:
    given = " - ".join(str(one) for one in ids if one is not None)
    return f"{name} (id {given})" if given else name
