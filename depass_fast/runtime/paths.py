"""The path of a file to be written, checked before any work."""

from __future__ import annotations

from pathlib import Path


def check_path(path: str | Path) -> None:
    """Raise FileNotFoundError or NotADirectoryError where a file's folder is none, IsADirectoryError for a folder."""
    folder = Path(path).parent
    if not folder.exists():
        raise FileNotFoundError(f"{path}: there is no folder {str(folder)!r}; make it, or give another path.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{path}: {str(folder)!r} is a file, and no folder; give another path.")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: it is a folder; give the path of a file.")
