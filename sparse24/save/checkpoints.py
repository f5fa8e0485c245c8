"""save_checkpoint, load_checkpoint: model, optimizer and recipe of a plain loop in one folder, whole or not there.

    <folder>/step-00000400/
        model.safetensors   the dense master weights under the dense model's names: `export` made it
        state.pt            version, optimizer, recipe and what else was given: plain tensors, numbers and strings

A checkpoint is written under a temporary name and renamed; earlier ones go only afterwards. Loading reads and checks
all of it before anything changes. Sharded models have `torch.distributed.checkpoint`: docs/distributed.md.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from ..convert import plain_name, unwrap
from ..errors import Sparse24Error
from ..files import write_folder_atomically
from ..layers import packing
from ..recipe import Recipe
from .exporting import export, load_exported, plain_state

VERSION = 1
WEIGHTS, STATE = "model.safetensors", "state.pt"


def save_checkpoint(
    folder: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    extra: dict | None = None,
    *,
    keep: int = 1,
) -> Path:
    """Write the checkpoint of the recipe's step under `folder`, keep the `keep` written last; returns its path.

    extra  what else must come back: states of a scheduler, a scaler, the data's position; plain numbers, strings,
           lists, dicts and tensors, which is what `torch.load(weights_only=True)` reads

    Save between two optimizer steps. Under DDP on one rank only; ranks then share torch's generators after loading,
    unless each restores its own. Raises Sparse24Error for sharded weights, for an `extra` that holds anything else, and
    where the step has a checkpoint already; OSError when the disk refuses. The checkpoints before are then still there.
    """
    folder = Path(folder)
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise Sparse24Error(f"keep must be an integer, 1 or more, got {keep!r}: the checkpoint just written stays")
    _refuse_shards(model)
    _check_plain(extra)
    state = {
        "version": VERSION,
        "recipe": recipe.state_dict(),
        "optimizer": optimizer.state_dict(),
        "extra": extra or {},
    }
    final = folder / f"step-{state['recipe']['step']:08d}"
    if final.exists():
        raise Sparse24Error(f"{final} exists already; save once a step, or into another folder")
    for left in folder.glob(".step-*.tmp"):  # by a process that was killed while writing
        shutil.rmtree(left, ignore_errors=True)

    def write(path: Path) -> None:
        export(model, path / WEIGHTS)
        torch.save(state, path / STATE)

    write_folder_atomically(final, write)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The complete checkpoints under `folder` in the order in which they were written.

    Not by step: a run that starts anew in the same folder, or goes back, writes lower steps than are there.
    """
    folder = Path(folder)
    found = [p for p in folder.iterdir() if re.fullmatch(r"step-\d{8,}", p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: ((path / STATE).stat().st_mtime_ns, path.name))


def load_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    *,
    override: bool = False,
    rng: bool = True,
) -> dict | None:
    """Take up a checkpoint; returns its `extra`, or None where `path` holds none: a fresh start.

    path           a checkpoint, or a folder of them: the one written last is taken
    override, rng  as in `Recipe.load_state_dict`

    Weights are cast to the model's dtype and go to its device. Raises Sparse24Error, changing nothing, for a checkpoint
    that is damaged, of another version or model, or whose recipe had other settings.
    """
    path = Path(path)
    if not (path / STATE).exists():
        found = checkpoints(path)
        if not found:
            return None
        path = found[-1]
    _refuse_shards(model)
    weights, state = _read(path)
    names = {plain_name(name): name for name in unwrap(model).state_dict()}
    _check_weights(path, weights, plain_state(model))
    _check_optimizer(path, state["optimizer"], optimizer)
    # The recipe looks at its state before it changes anything; what follows has been looked at.
    recipe.load_state_dict(state["recipe"], override=override, rng=rng)
    optimizer.load_state_dict(state["optimizer"])
    unwrap(model).load_state_dict({names[name]: tensor for name, tensor in weights.items()})
    return state["extra"]


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        weights, _ = load_exported(path / WEIGHTS)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, Sparse24Error) as error:
        reason = (str(error).splitlines() or ["no detail"])[0]
        raise Sparse24Error(
            f"checkpoint {path} cannot be read ({type(error).__name__}: {reason}); it is damaged, or not of "
            "sparse24: restore it from a copy, or name an older one"
        ) from error
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise Sparse24Error(f"checkpoint {path} has version {version}, this sparse24 reads {VERSION}")
    if not {"optimizer", "recipe", "extra"} <= state.keys():
        raise Sparse24Error(f"checkpoint {path} lacks one of optimizer, recipe and extra: it is damaged")
    return weights, state


def _check_weights(path: Path, saved: dict[str, Tensor], have: dict[str, Tensor]) -> None:
    problems = [f"{name} is not in the checkpoint" for name in have.keys() - saved.keys()]
    problems += [f"{name} is not in the model" for name in saved.keys() - have.keys()]
    problems += [
        f"{name} is {tuple(saved[name].shape)} in the checkpoint, {tuple(have[name].shape)} in the model"
        for name in have.keys() & saved.keys()
        if saved[name].shape != have[name].shape
    ]
    if problems:
        raise Sparse24Error(f"checkpoint {path} is of another model: {'; '.join(sorted(problems)[:4])}")


def _check_optimizer(path: Path, saved: dict, optimizer: torch.optim.Optimizer) -> None:
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if not isinstance(groups, list) or [len(group.get("params", ())) for group in groups] != sizes:
        raise Sparse24Error(
            f"checkpoint {path} is of another optimizer: this one has parameter groups of {sizes} tensors; make it as "
            "it was made then"
        )


def _check_plain(extra: dict | None) -> None:
    torch.save(extra, buffer := io.BytesIO())
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise Sparse24Error(
            "extra must hold plain numbers, strings, lists, dicts and tensors, which a reader can load without running "
            f"code: {str(error).splitlines()[0]}"
        ) from error


def _refuse_shards(model: nn.Module) -> None:
    if any(packing.is_dtensor(parameter) for parameter in model.parameters()):
        raise Sparse24Error(
            "the weights are sharded (FSDP2): save them by torch.distributed.checkpoint and the recipe's state beside, "
            "see docs/distributed.md"
        )
