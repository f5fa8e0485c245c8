"""Files and folders that are either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import Sparse24FileError

#: errors that no room on the disk helps against
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a crash leaves the old file, or none.

    The bytes reach the disk before the name does. Several processes may write the same path; the last one stays. Raises
    Sparse24FileError (an OSError) when the disk refuses or `path` is no plain file; the temporary file is then removed.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # renaming would put a file in the place of a folder or of /dev/null
        raise Sparse24FileError(f"{path} is there and is not a plain file; give another name")
    if not path.parent.is_dir():  # safetensors and torch would report a full disk
        raise Sparse24FileError(f"{path} could not be written (no folder {path.parent}); make the folder first")
    temporary = _beside(path)
    try:
        with refusals_named(path):
            temporary.touch()  # Python says why a place takes no files, where torch and safetensors do not
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: str | os.PathLike, text: str) -> None:
    """`write_atomically` of UTF-8 text, in which file names of other bytes stay those bytes."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8", errors="surrogateescape"))


def write_folder_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder beside `path`, then rename it: a crash leaves no folder of that name.

    `path` must not exist. The files reach the disk before the name does. Raises Sparse24FileError (an OSError) when the
    disk refuses; the temporary folder is then removed.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        with refusals_named(path):
            temporary.mkdir(parents=True)
            write(temporary)
            for file in (*temporary.iterdir(), temporary):
                sync(file)
            os.rename(temporary, path)
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A name in the same folder, so on the same disk, that nobody else has or can guess and put a link at."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}.tmp")


def remove_unfinished(folder: Path, pattern: str) -> None:
    """Remove what killed processes left of writing files or folders whose name matches `pattern`."""
    for left in folder.glob(f".{pattern}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder that others read: it loses its name first, so a crash leaves no half of it under that name.

    Where the disk refuses, it stays, or what is left of it is for `remove_unfinished`.
    """
    unnamed = _beside(path)
    with contextlib.suppress(OSError):
        os.rename(path, unnamed)
        shutil.rmtree(unnamed, ignore_errors=True)


def sync(path: Path) -> None:
    """Ask the disk to hold it: a rename that survives a power cut must not point to data that did not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some file systems have no fsync for folders
    finally:
        os.close(handle)


@contextlib.contextmanager
def refusals_named(path: str | os.PathLike, remedy: str = "") -> Iterator[None]:
    """Turn what the file system refuses within into Sparse24FileError, whichever library reports it."""
    try:
        yield
    except Exception as error:
        if not _is_refusal(error):
            raise
        reason, number = _reason(error), getattr(error, "errno", None)
        remedy = remedy or "make room on that disk, or raise the limit of file sizes (ulimit -f), and write again"
        if number in _NOT_OURS:
            remedy = "name a place in a folder that is there and that this process may write to"
        named = Sparse24FileError(
            f"{path} could not be written ({reason}); what was there before is untouched: {remedy}"
        )
        named.errno, named.reason = number, reason
        raise named from error


def _reason(error: Exception) -> str:
    if isinstance(error, Sparse24FileError) and error.reason:  # of a file within the one that is named now
        return error.reason
    if isinstance(error, OSError):
        return error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
    return f"the disk is full, or a limit is reached: {(str(error).splitlines() or ['no detail'])[0]}"


def _is_refusal(error: Exception) -> bool:
    """torch.save and safetensors report a full disk by exceptions of their own, not by OSError."""
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        return True
    of_torch = ("inline_container", "PytorchStreamWriter", "iostream", "Parent directory")
    return type(error) is RuntimeError and any(word in str(error) for word in of_torch)


def empty(folder: Path) -> None:
    """Remove all that is in `folder`, and `folder` too unless it is a link: a link to a larger disk stays one.

    Raises Sparse24FileError naming what could not be removed.
    """
    try:
        if folder.is_symlink():
            for inside in folder.iterdir() if folder.is_dir() else ():
                shutil.rmtree(inside) if inside.is_dir() and not inside.is_symlink() else inside.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        reason = error.strerror or error
        raise Sparse24FileError(
            f"{error.filename or folder} could not be removed ({reason}); remove {folder} yourself, or name another"
        ) from error
