"""A checkpoint is a folder: written whole, sealed by digests of its files, and read in full before anything uses it.

    <folder>/step-00000400/
        model.safetensors   weights that `export` wrote
        state.pt            plain tensors, numbers and strings
        ...                 what else its writer adds
        SHA256SUMS          the digest of each

`save_checkpoint` and the main job, `pretrain`, write theirs by these functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import Sparse24Error
from ..files import check_seal, remove_folder, remove_unfinished, seal, write_folder_atomically
from .exporting import load_exported

WEIGHTS, STATE = "model.safetensors", "state.pt"


class Saved(NamedTuple):
    """A checkpoint as it was read."""

    path: Path
    weights: dict[str, Tensor]
    state: dict[str, Any]


def write_checkpoint(final: Path, write: Callable[[Path], object], keep: int = 1) -> None:
    """Let `write` fill the folder `final`, seal it, then remove all but the `keep` checkpoints written last.

    Raises Sparse24FileError when the disk refuses; the checkpoints before are then still there, and nothing else is.
    """
    remove_unfinished(final.parent, "step-*")  # by a process that was killed while writing

    def write_and_seal(path: Path) -> None:
        write(path)
        seal(path)

    write_folder_atomically(final, write_and_seal)
    for old in checkpoints(final.parent)[:-keep]:
        remove_folder(old)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints under `folder` in the order in which they were written.

    Not by step: a run that starts anew in the same folder, or goes back, writes lower steps than are there.
    """
    found = [path for path in folder.iterdir() if _is_named_so(path)] if folder.is_dir() else []
    return sorted(found, key=lambda path: (_written(path), path.name))


def newest_checkpoint(path: Path) -> Path | None:
    """`path` itself where it is a checkpoint, damaged or not; else the one written last under it, if any is there.

    Raises Sparse24Error for a file, and for the name of one checkpoint that is not there.
    """
    if path.is_file():
        raise Sparse24Error(f"{path} is a file; name the folder of a checkpoint, or a folder of checkpoints")
    if path.is_dir() and (_is_named_so(path) or (path / STATE).exists() or (path / WEIGHTS).exists()):
        return path
    if _is_named_so(path) and not path.exists():
        others = ", ".join(other.name for other in checkpoints(path.parent)[-4:]) or "none"
        raise Sparse24Error(f"{path} does not exist; checkpoints in {path.parent}: {others}")
    found = checkpoints(path)
    return found[-1] if found else None


def _is_named_so(path: Path) -> bool:
    return re.fullmatch(r"step-\d+", path.name) is not None


def _written(path: Path) -> int:
    state = path / STATE
    return (state if state.exists() else path).stat().st_mtime_ns


def read_checkpoint(path: Path, version: int, remedy: str) -> Saved:
    """All of a checkpoint, on the CPU, once its files are known to be those that were written.

    remedy  what whoever reads can do about a damaged one

    Raises Sparse24Error for another version, and for files that are missing, damaged or of another checkpoint. Nothing
    in them can run code.
    """
    try:
        state = read_state(path / STATE)
        _check_version(path, state, version)
        check_seal(path)
        return Saved(path, load_exported(path / WEIGHTS).weights, state)
    except OtherVersion:
        raise
    except (OSError, Sparse24Error) as error:
        raise Sparse24Error(
            f"checkpoint {path} cannot be read ({error}); it is damaged (truncated or corrupt), or not of sparse24: "
            f"{remedy}"
        ) from error


class OtherVersion(Sparse24Error):
    """A checkpoint that another version of sparse24 wrote."""


def _check_version(path: Path, state: Any, version: int) -> None:
    found = state.get("version") if isinstance(state, dict) else None
    if type(found) is not int or found != version:
        raise OtherVersion(
            f"checkpoint {path} has version {found}, this sparse24 reads {version}; go on with the one that wrote it"
        )


def read_state(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU. Raises Sparse24Error for a damaged file, whatever zip or pickle raise."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or ["no detail"])[0]
        raise Sparse24Error(f"{path.name}: {type(error).__name__}: {reason}") from error
