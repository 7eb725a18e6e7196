"""Whole files or none: a crash, a full disk or Ctrl-C never leaves half a result behind.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_path", "files_in", "refuse_overwrite"]


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to (a file or a folder); on success it becomes ``path``.

    The temporary name ends as the target does, so writers that choose a format by suffix choose the same one. Missing
    parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or (error.filename is not None and Path(error.filename) != temporary):
            raise  # about another file, which it names itself
        what = f"could not be written ({error.strerror or error}); nothing was kept"
        raise OSError(error.errno, what, str(path)) from error
    finally:
        _remove(temporary)


def refuse_overwrite(path: Path | str, force: bool) -> None:
    """Stop before anything is computed when the result would replace something and nobody asked for it."""
    if Path(path).exists() and not force:
        raise FileExistsError(f"{path} exists; use --force to replace it")


def _flush(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def files_in(folder: Path) -> set[str]:
    """All files below a folder, by their paths in it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
