"""Atomic writes: a reader of a path sees the old file or the new one, never an incomplete one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp"


def temporary_path(path: Path) -> Path:
    """Return the path of the temporary file beside `path`."""
    return path.with_name(f".{path.name}{TEMPORARY}")


@contextlib.contextmanager
def atomic_write(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` and rename it to `path` at the end; on an error `path` is unchanged.

    Args:
        path: The file to write.
        sync: Flush the file and its folder to disk, so that the write survives a power failure.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if sync:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a rename survives a power failure, if the file system supports it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically; bytes of file names that are not valid text are escaped."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically."""
    write_text(path, json.dumps(content, indent=1))


def link(path: Path, other: Path, *, or_copy: bool) -> bool:
    """Create the hard link `other` to `path`, replacing an existing file; return whether that succeeded.

    The file must never be written in place. With `or_copy` it is copied if the file system has no hard links.
    """
    temporary = temporary_path(other)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        if not or_copy:
            return False
        shutil.copyfile(path, temporary)
    os.replace(temporary, other)
    temporary.unlink(missing_ok=True)  # still there if `other` was already a link to `path`: then nothing is renamed
    return True


def require_free(folder: Path) -> None:
    """Raise ValueError unless `folder` is new or empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        what = "is not empty" if folder.is_dir() else "is a file"
        raise ValueError(f"{folder} {what}; name a new folder with --output, or remove it")


@contextlib.contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Create a temporary folder beside `folder` and rename it to `folder` at the end; on an error it is removed.

    Args:
        folder: The folder to write.
        replace: Remove an existing `folder` at the end.

    Raises:
        ValueError: If `folder` is neither new nor empty, without `replace`.
    """
    if not replace:
        require_free(folder)
    temporary = temporary_path(folder)  # so that `folder` exists only when it is complete
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if replace:
            shutil.rmtree(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
