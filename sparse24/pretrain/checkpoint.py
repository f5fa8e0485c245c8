"""Checkpoints of a run: those of the library, plus files for other readers and the run's settings.

    <out>/checkpoint/<arm>/step-000400/
        model.safetensors   fp32 master weights under the dense model's names
        config.json         the transformers config: `from_pretrained` opens the folder
        tokenizer.json      when there is one
        state.pt            optimizer, recipe, generators and position: plain tensors, numbers and strings
        settings.json       what the run was asked for
        SHA256SUMS          the digest of each

It is written under a temporary name and renamed; the one before goes only afterwards. So a crash at any moment
leaves a complete one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Sparse24Error
from ..files import read_json, refusals_named, remove_unfinished
from ..save import export
from ..save.fitting import check_weights
from ..save.fitting import load_weights as load_checked_weights
from ..save.folders import STATE, WEIGHTS, checkpoints, read_checkpoint, write_checkpoint

STATE_VERSION = 1
SETTINGS, CONFIG = "settings.json", "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read in full, before anything is changed by it."""

    path: Path
    weights: dict[str, Tensor]
    state: dict[str, Any]
    model_config: dict[str, Any]
    settings: dict[str, Any]


def save(folder: Path, step: int, model: nn.Module, state: dict[str, Any], settings: dict[str, Any], tokenizer) -> Path:
    """Write the checkpoint of `step` under `folder`, then drop older ones. Returns its path.

    Raises Sparse24Error when the disk refuses, or the folder holds this step of another run; the checkpoint before is
    then still there.
    """
    final = folder / f"step-{step:06d}"
    if final.exists():
        if read_json(final / SETTINGS) != json.loads(json.dumps(settings)):
            raise Sparse24Error(f"{final} is of another run; name another --out, or remove {folder}")
        return final  # saved before at this step: a run is a function of its settings, so the content is equal

    def write(path: Path) -> None:
        export(model, path / WEIGHTS)
        config = getattr(model, "config", None)
        (path / CONFIG).write_text(json.dumps(config.to_dict() if config else {}, indent=2) + "\n")
        (path / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        tokenizer.save(path)
        torch.save({"version": STATE_VERSION, "step": step, **state}, path / STATE)

    with refusals_named(f"the checkpoint of step {step} in {folder}", "make room, then --resume"):
        write_checkpoint(final, write)
    return final


def complete(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints under `folder`, the one written last at the end."""
    return [(int(re.sub(r"\D", "", path.name)), path) for path in checkpoints(folder)]


def load(folder: Path) -> Checkpoint | None:
    """The newest checkpoint under `folder`, or None when there is none; removes what a killed process left there.

    Raises Sparse24Error when it is damaged or of another version. Nothing in it can run code.
    """
    remove_unfinished(folder, "step-*")
    found = checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    saved = read_checkpoint(path, STATE_VERSION, "restore it from a copy, or start anew with --overwrite")
    return Checkpoint(path, saved.weights, saved.state, read_json(path / CONFIG), read_json(path / SETTINGS))


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the weights in; names, shapes and dtypes are compared first: a refused checkpoint changes nothing."""
    check_weights(checkpoint.path, checkpoint.weights, model)
    load_checked_weights(model, checkpoint.weights)
