"""The folder of a run: its shards, the prompts that are done, and the lock of every process at work in it.

Layout::

    manifest.json                    what the run is (manifest.py)
    scores.parquet/SHARD.parquet     a row per prompt, target, position and component (rows.py)
    scores.dense/SHARD.safetensors   all scores of the same prompts, where they were asked for (dense.py)
    errors.parquet/SHARD.parquet     a row per prompt that failed: prompt, error, reason

A file is written as .parts/NAME.part, and renamed when all of it is on the disk. A prompt is done
when a shard names it: a process that is killed leaves what it finished, and no half of anything. The name of a shard is
the hash of its prompts, so that the same work done twice replaces itself.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.extras import needed
from ..runtime.log import warn_user
from ..runtime.memory import readable
from .dense import Dense
from .outcomes import Outcome
from .rows import Rows, failures_table

if TYPE_CHECKING:
    import pyarrow

SCORES, ERRORS, DENSE, PARTS = "scores.parquet", "errors.parquet", "scores.dense", ".parts"
LEAST_FREE = 64 << 20  # bytes that there must be for a shard when a run begins


def shards(folder: Path, kind: str) -> list[Path]:
    """Return the finished files of a kind, :data:`SCORES`, :data:`ERRORS` or :data:`DENSE`.

    A dense file counts once its shard is there, which is written after it.
    """
    if kind == DENSE:
        return [path for path in sorted((folder / DENSE).glob("*.safetensors")) if _of_dense(path).exists()]
    return sorted((folder / kind).glob("*.parquet"))


def _of_dense(path: Path) -> Path:
    return path.parents[1] / SCORES / f"{path.stem}.parquet"


def read_shard(path: Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """Return a shard, or some of its columns.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            return file.read(None if columns is None else list(columns))
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged ({error}). Remove it, and its prompts are done again.") from error


def prompts_of(folder: Path, *kinds: str) -> set[str]:
    """Return the prompts that the shards of some kinds name: finished in :data:`SCORES`, failed in :data:`ERRORS`.

    Raises:
        ValueError: a prompt is in two shards; the message names both.
    """
    found: dict[str, Path] = {}
    for path in (path for kind in kinds for path in shards(folder, kind)):
        for name in read_shard(path, ["prompt"]).column("prompt").unique().to_pylist():
            if name in found:
                raise ValueError(
                    f"{path}: the prompt {name!r} is in {found[name].name}, too: two processes had the same share. "
                    "Remove one of the two files, and what only that one holds is done again."
                )
            found[name] = path
    return set(found)


def check_room(folder: Path) -> None:
    """Make the folder of a run, and check that it can hold a shard.

    Raises:
        OSError: it cannot be made or written to, or the disk is full.
    """
    needed("pyarrow", "sweep: shards are Parquet files", "sweep")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"out: {folder} is a file; give a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE:
        raise OSError(f"out: {readable(free)} are free in {folder}, and a shard may take {readable(LEAST_FREE)}.")


def remove_unfinished(folder: Path, lock: str, world: int) -> None:
    """Remove the half files of processes that were killed: all but those of the others of this ``world``."""
    for path in (folder / PARTS).glob("*.part"):
        if path.name.startswith(f"{lock}-") or f"-of-{world}-" not in path.name:
            path.unlink(missing_ok=True)


def forget_failures(folder: Path, world: int) -> None:
    """Remove the rows of failed prompts, so that they are tried again.

    Raises:
        ValueError: there are several processes, of which one would remove the others' new rows.
    """
    if world > 1:
        raise ValueError("retry_failed: one process tries failed prompts again, and there are several.")
    for path in shards(folder, ERRORS):
        path.unlink(missing_ok=True)


def write_shard(folder: Path, lock: str, outcomes: Sequence[Outcome], rows: Rows, dense: Dense | None) -> Path | None:
    """Write the shard of some prompts; a dense file first, as the table says that they are done.

    Returns the table's path; None where all failed.

    Raises:
        OSError: the disk is full, or the folder has gone.
    """
    from pyarrow import parquet

    def write(table: pyarrow.Table) -> Callable[[Path], None]:
        return lambda path: parquet.write_table(table, path, compression="zstd")

    finished = [outcome for outcome in outcomes if outcome.failure is None]
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    path, name = None, _name(outcomes)
    if finished:
        if dense is not None:
            _put(folder / DENSE / f"{name}.safetensors", lock, dense.write)
        path = folder / SCORES / f"{name}.parquet"
        _put(path, lock, write(rows.table()))
    errors = folder / ERRORS / f"{name}.parquet"
    if failed:
        _put(errors, lock, write(failures_table(failed)))
    # the same prompts may have ended otherwise before
    for other in ([] if failed else [errors]) + ([] if finished else [folder / SCORES / errors.name]):
        other.unlink(missing_ok=True)
    return path


def _name(outcomes: Sequence[Outcome]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for outcome in sorted(outcome.id for outcome in outcomes):
        digest.update(outcome.encode("utf-8", errors="surrogatepass") + b"\0")
    return digest.hexdigest()


def _put(path: Path, lock: str, write: Callable[[Path], None]) -> None:
    """Write a file under another name and rename it when it is on the disk."""
    path.parent.mkdir(exist_ok=True)
    part = path.parents[1] / PARTS / f"{lock}-{path.parent.name}-{path.name}.part"
    part.parent.mkdir(exist_ok=True)
    try:
        write(part)
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems sync no folders
            raise
    finally:
        os.close(handle)


@contextmanager
def at_work(folder: Path, rank: int, world: int) -> Iterator[str]:
    """Hold the lock of process ``rank`` of ``world`` in a folder, and yield its name. It ends with the process.

    Raises:
        ValueError: such a process is at work there already, or others are that deal prompts in another way.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        _doubt_locks(folder)
        yield f"worker-{rank}-of-{world}"
        return
    name = f"worker-{rank}-of-{world}"
    held = _locked(folder / f".{name}.lock", fcntl)
    if held is None:
        raise ValueError(f"out: another process (rank {rank} of {world}) is at work in {folder}; wait until it ends.")
    try:
        for path in folder.glob(".worker-*-of-*.lock"):
            if path.name.rpartition("-")[2] != f"{world}.lock":
                other = _locked(path, fcntl)
                if other is None:
                    raise ValueError(
                        f"out: processes of another number than {world} are at work in {folder} "
                        f"({path.name[1:].removesuffix('.lock')}); wait until they end."
                    )
                path.unlink(missing_ok=True)
                os.close(other)
        yield name
    finally:
        os.close(held)


def _locked(path: Path, fcntl: Any) -> int | None:
    """Return the handle of a file that this process locked; None where another one holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a file system without locks
        _doubt_locks(path.parent)
    return handle


def _doubt_locks(folder: Path) -> None:
    warn_user(
        f"out: the file system of {folder} has no locks, so that a second process with the same share is not noticed; "
        "start none before this one has ended.",
        RuntimeWarning,
    )
