"""Tables of results: CSV files and pandas DataFrames."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
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


def data_frame(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> pandas.DataFrame:
    """Return a table as a DataFrame.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_dataframe needs pandas: pip install 'depass-fast[pandas]'") from error
    return pandas.DataFrame(list(rows), columns=list(names))
