"""save_checkpoint, load_checkpoint: model, optimizer and recipe of a plain loop in one folder, whole or not there.

    <folder>/step-00000400/
        model.safetensors   the dense master weights under the dense model's names: `export` made it
        state.pt            version, optimizer, recipe and what else was given: plain tensors, numbers and strings
        SHA256SUMS          digests of both

A checkpoint is written under a temporary name and renamed; earlier ones go only afterwards. Loading reads and checks
all of it before anything changes. Sharded models have `torch.distributed.checkpoint`: docs/distributed.md.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import Sparse24Error
from ..layers import check_module, packing
from ..options import at_least, checked_options
from ..recipe import Recipe
from .exporting import export
from .fitting import check_optimizer, check_weights, load_weights
from .folders import STATE, WEIGHTS, newest_checkpoint, read_checkpoint, write_checkpoint

VERSION = 1


@checked_options(keep=at_least(1))
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
    where the step has a checkpoint already; Sparse24FileError (an OSError) when the disk refuses. The checkpoints
    before are then still there.
    """
    _check_arguments(model, optimizer, recipe)
    folder = Path(folder)
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

    def write(path: Path) -> None:
        export(model, path / WEIGHTS)
        torch.save(state, path / STATE)

    write_checkpoint(final, write, keep)
    return final


@checked_options()
def load_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    *,
    override: bool = False,
    rng: bool = True,
    required: bool = False,
) -> dict | None:
    """Take up a checkpoint; returns its `extra`, or None where `path` holds none: a fresh start.

    path           a checkpoint, or a folder of them: the one written last is taken
    override, rng  as in `Recipe.load_state_dict`
    required       a folder without checkpoints, of a mistyped name perhaps, is an error and no fresh start

    Weights are cast to the model's dtype and go to its device. Raises Sparse24Error, changing nothing, for a checkpoint
    that is damaged, of another version or model, or whose recipe had other settings, and where `path` names a single
    checkpoint (step-...) that is not there.
    """
    _check_arguments(model, optimizer, recipe)
    folder, path = Path(path), newest_checkpoint(Path(path))
    if path is None:
        if required:
            why = "holds no checkpoint" if folder.is_dir() else "does not exist"
            raise Sparse24Error(f"{folder} {why}; name the folder that save_checkpoint was given")
        return None
    saved = read_checkpoint(path, VERSION, "restore it from a copy, or name an older one")
    state = saved.state
    if not {"optimizer", "recipe", "extra"} <= state.keys():
        raise Sparse24Error(f"checkpoint {path} lacks one of optimizer, recipe and extra: it is damaged")
    check_weights(path, saved.weights, model)
    check_optimizer(path, state["optimizer"], optimizer)
    before = optimizer.state_dict()  # references, no copies: loading makes tensors anew
    try:
        _load_optimizer(path, state["optimizer"], optimizer)
        # the recipe looks at its state before it changes anything
        recipe.load_state_dict(state["recipe"], override=override, rng=rng)
    except BaseException:
        optimizer.load_state_dict(before)
        raise
    load_weights(model, saved.weights)
    return state["extra"]


def _load_optimizer(path: Path, saved: dict, optimizer: torch.optim.Optimizer) -> None:
    try:
        optimizer.load_state_dict(saved)
    except Exception as error:  # of a class of its own, whose states nobody else knows
        raise Sparse24Error(
            f"checkpoint {path} is of another optimizer: {type(optimizer).__name__} refuses its state ({error}); make "
            "it as it was made then"
        ) from error


def _check_plain(extra: dict | None) -> None:
    torch.save(extra, buffer := io.BytesIO())
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise Sparse24Error(
            "extra must hold plain numbers, strings, lists, dicts and tensors, which a reader can load without running "
            f"code; {_not_plain(extra, 'extra')}. Save the state_dict() of schedulers and the like"
        ) from error


def _not_plain(value: Any, name: str) -> str:
    """The first thing in `value` that is not plain: its place and its type."""
    if isinstance(value, dict):
        found = (_not_plain(inner, f"{name}[{key!r}]") for key, inner in value.items())
        return next(filter(None, found), "")
    if isinstance(value, (list, tuple)):
        found = (_not_plain(inner, f"{name}[{i}]") for i, inner in enumerate(value))
        return next(filter(None, found), "")
    plain = value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.Tensor))
    return "" if plain else f"{name} is a {type(value).__name__}"


def _check_arguments(model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
    check_module(model)
    if not isinstance(recipe, Recipe):
        raise Sparse24Error(
            f"recipe must be the sparse24.Recipe that trains the model, got {type(recipe).__name__}; a model without "
            "one is written by sparse24.export"
        )
    if not hasattr(optimizer, "param_groups"):  # wrappers of trainers are no torch.optim.Optimizer
        raise Sparse24Error(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if any(packing.is_dtensor(parameter) for parameter in model.parameters()):
        raise Sparse24Error(
            "the weights are sharded (FSDP2): save them by torch.distributed.checkpoint and the recipe's state beside, "
            "see docs/distributed.md"
        )
