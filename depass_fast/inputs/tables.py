"""Files of records, read a line or a row at a time: JSONL, JSON, CSV, TSV, Parquet, and data sets of `datasets`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..runtime.extras import needed
from .records import read_records

Rows: TypeAlias = Iterator["Row"]
_READ_BY_ENDING = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet"
_OF_DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json")  # a folder of `save_to_disk` holds one of these
_ROWS = 1024  # of a Parquet file, read together


class Row(NamedTuple):
    """A record, and its place as errors name it: "prompts.jsonl, line 7"."""

    place: str
    values: Mapping[str, Any]


class Table(NamedTuple):
    """Records that can be gone through again: ``rows()`` begins anew. ``is_text``: every value is a text, as in CSV."""

    name: str
    rows: Callable[[], Rows]
    is_text: bool = False


def open_table(source: str | Path, split: str | None = None) -> Table:
    """Return the records of a file, of a folder, or of a data set on the hub.

    Args:
        source: a file that ends in .jsonl or .ndjson (an object, or a text, on every line), .json (a list of objects),
            .csv or .tsv (with a head), .parquet; a folder of Parquet files, or of `datasets.Dataset.save_to_disk`; or
            the name of a data set on the hub.
        split: the split of a data set. Default: "train" where there are several.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is of another kind.
        ImportError: pyarrow or datasets is needed and not installed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, split)
    ending = path.suffix.lower()
    if not path.exists():
        if ending in _READERS or ending == ".json" or path.is_absolute() or str(source).startswith((".", "~")):
            raise FileNotFoundError(f"{source}: there is no such file.")
        return _of_datasets(str(source), split)
    if split is not None:
        raise ValueError(f"split: {split!r} belongs to a data set; {path} is a file.")
    if ending == ".json":
        return Table(path.name, lambda: _listed(path))
    if ending not in _READERS:
        raise ValueError(f"{path}: the kind of the file is not known; its name ends in one of {_READ_BY_ENDING}.")
    read, is_text = _READERS[ending]
    return Table(path.name, lambda: read(path), is_text)


def _lines(path: Path) -> Rows:
    """Yield the objects of a JSONL file; a line that is a text is a prompt."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Row(f"{path.name}, line {number}", _value(f"{path}, line {number}", line))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is no text in UTF-8 ({error.reason} at byte {error.start}).") from None


def _value(place: str, line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}, column {error.colno}: no JSON ({error.msg}).") from None
    except RecursionError:
        raise ValueError(f"{place}: no JSON that can be read (too many brackets inside one another).") from None
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object with fields, or a text, got {type(value).__name__}.")
    return value


def _listed(path: Path) -> Rows:
    for number, value in enumerate(read_records(path, {}), 1):
        yield Row(f"{path.name}, entry {number}", value)


def _comma_separated(path: Path, delimiter: str = ",") -> Rows:
    csv.field_size_limit(1 << 30)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            head = next(reader, None)
            if head is None:
                return
            if twice := sorted({name for name in head if head.count(name) > 1}):
                raise ValueError(f"{path}, line 1: the column {twice[0]!r} is there twice.")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(head):
                    raise ValueError(f"{path}, line {line}: {len(cells)} cells, and the head has {len(head)}.")
                if cells:
                    yield Row(f"{path.name}, line {line}", dict(zip(head, cells, strict=True)))
                line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no table ({error}).") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is no text in UTF-8 ({error.reason} at byte {error.start}).") from None


def _parquet(path: Path) -> Rows:
    needed("pyarrow", "Parquet files", "sweep")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path.name}, row {number}", values)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: it is no Parquet file that can be read ({error}).") from None


_READERS: dict[str, tuple[Callable[[Path], Rows], bool]] = {
    ".jsonl": (_lines, False),
    ".ndjson": (_lines, False),
    ".csv": (_comma_separated, True),
    ".tsv": (lambda path: _comma_separated(path, "\t"), True),
    ".parquet": (_parquet, False),
}


def _folder(path: Path, split: str | None) -> Table:
    if any((path / name).exists() for name in _OF_DATASETS):
        return _of_datasets(str(path), split)
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise ValueError(f"{path}: it is no folder of a data set, and holds no Parquet files.")
    if split is not None:
        raise ValueError(f"split: {split!r} belongs to a data set; {path} holds Parquet files.")
    return Table(path.name, lambda: (row for file in files for row in _parquet(file)))


def _of_datasets(name: str, split: str | None) -> Table:
    """Return a data set that was saved in a folder, or that the hub has."""
    needed("datasets", f"the data set {name!r}", "sweep")
    import datasets

    try:
        found = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
    except Exception as error:  # the library raises errors of many kinds for a name that is none
        raise ValueError(f"{name}: it is no file here, and no data set that can be loaded ({error}).") from error
    if isinstance(found, Mapping):
        wanted = split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else None)
        if wanted not in found:
            raise ValueError(f"split: {wanted!r} is none of those of {name}: {', '.join(found)}.")
        found = found[wanted]
    elif split is not None:
        raise ValueError(f"split: {split!r} is given, and {name} has only one.")
    held: Any = found.with_format(None)  # plain Python values, whatever it was saved with
    return Table(name, lambda: (Row(f"{name}, row {number}", values) for number, values in enumerate(held, 1)))
