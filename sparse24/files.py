"""Files and folders that are either whole or not there."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a crash leaves the old file, or none.

    The bytes reach the disk before the name does. Several processes may write the same path; the last one stays. Raises
    OSError as `write` does; the temporary file is then removed.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder beside `path`, then rename it: a crash leaves no folder of that name.

    `path` must not exist. The files reach the disk before the name does. Raises OSError as `write` does; the temporary
    folder is then removed.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for file in (*temporary.iterdir(), temporary):
            sync(file)
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A name in the same folder, so on the same disk, that nobody else has, on this machine or another."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def sync(path: Path) -> None:
    """Ask the disk to hold it: a rename that survives a power cut must not point to data that did not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some file systems have no fsync for folders
    finally:
        os.close(handle)
