"""One process a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ..errors import Sparse24Error, Sparse24FileError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` (which exists) for this process; Sparse24Error, naming the process, when another holds it.

    The lock is the kernel's (flock on `.lock`), so it ends with its process, however that ends: a file left behind
    locks nothing. On file systems without flock the process named in the file decides, if it is of this machine.
    """
    import fcntl

    path = folder / LOCK
    while True:
        handle = _open(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            owner = _owner(handle)
            if held or _is_alive(owner):
                os.close(handle)
                raise _in_use(folder, owner, held) from None
        if _is_still(handle, path):  # else its owner removed it between our open and our lock
            break
        os.close(handle)
    try:
        os.truncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:  # a link too: what it points to is not ours to write
        raise Sparse24FileError(
            f"{path} cannot be opened ({error.strerror}); remove it, or name another folder"
        ) from error


def _owner(handle: int) -> tuple[int, str]:
    """(pid, host) in the lock's file; (0, "") where it says none."""
    pid, _, host = os.pread(handle, 300, 0).decode("utf-8", "replace").strip().partition(" ")
    return (int(pid), host) if pid.isdecimal() and len(pid) < 10 else (0, "")


def _is_alive(owner: tuple[int, str]) -> bool:
    pid, host = owner
    if not pid or host != socket.gethostname():
        return bool(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, of another user
    return True


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _in_use(folder: Path, owner: tuple[int, str], held: bool) -> Sparse24Error:
    pid, host = owner
    who = f"process {pid} on {host}" if pid else "another process"
    stop = f", stop it (kill {pid})" if pid else ""
    gone = "" if held else f", remove {folder / LOCK} if it has ended"
    return Sparse24Error(f"{folder} is in use by {who}; wait until it ends{stop}{gone}, or name another folder")
