"""Digests of the files of a folder: they show a file that was damaged, or that comes from another folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import Sparse24Error

DIGESTS = "SHA256SUMS"  # as `sha256sum` writes it: `sha256sum -c SHA256SUMS` checks a folder without sparse24


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Write the digest of every file of `folder` into its SHA256SUMS."""
    (folder / DIGESTS).write_text("".join(f"{line}\n" for line in _lines(folder)), encoding="utf-8")


def _lines(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.name != DIGESTS)
    return [f"{sha256(folder / name)}  {name}" for name in names]


def check_seal(folder: Path) -> None:
    """Raise Sparse24Error unless the files of `folder` are those that `seal` saw, byte for byte."""
    found = _lines(folder)
    try:
        text = (folder / DIGESTS).read_bytes().decode()
    except FileNotFoundError as error:
        files = " ".join(line.split("  ", 1)[1] for line in found)
        raise Sparse24Error(
            f"{DIGESTS} is missing; if you trust the files, (cd {folder} && sha256sum {files} > {DIGESTS})"
        ) from error
    except ValueError as error:
        raise Sparse24Error(f"{DIGESTS} is damaged") from error
    if sorted(found) == sorted(text.split("\n")[:-1]) and text.endswith("\n"):
        return
    expected = {line.partition("  ")[2] for line in text.split("\n")}
    names = {line.partition("  ")[2] for line in found}
    missing = sorted(expected - names - {""})
    if missing:
        raise Sparse24Error(f"{missing[0]!r} is missing, or {DIGESTS} is damaged")
    other = next((line for line in found if line not in text), f"  {DIGESTS}").partition("  ")[2]
    raise Sparse24Error(f"{other} is not the file that was written: it was damaged, or is of another checkpoint")
