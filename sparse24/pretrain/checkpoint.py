"""Checkpoints: a folder a step, complete or not there.

    <out>/checkpoint/<arm>/step-000400/
        model.safetensors   fp32 master weights under the dense model's names
        config.json         the transformers config: `from_pretrained` opens the folder
        tokenizer.json      when there is one
        state.pt            optimizer, recipe, generators and position: plain tensors, numbers and strings
        settings.json       what the run was asked for

It is written under a temporary name and renamed; the one before goes only afterwards. So a crash at any moment
leaves a complete one.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Sparse24Error
from ..files import sync

STATE_VERSION = 1


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

    Raises Sparse24Error when the disk refuses; the checkpoint before is then still there.
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f".writing-step-{step:06d}"
    if final.exists():  # saved before at this step: a run is a function of its settings, so the content is equal
        return final
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_files(temporary, model, {"version": STATE_VERSION, "step": step, **state}, settings, tokenizer)
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        temporary.rename(final)
        sync(folder)
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise Sparse24Error(
            f"the checkpoint of step {step} could not be written to {folder} ({e.strerror or e}); "
            f"the one before is untouched: make room, then --resume"
        ) from e
    for _, old in complete(folder):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def write_files(folder: Path, model: nn.Module, state: dict[str, Any], settings: dict[str, Any], tokenizer) -> None:
    from safetensors.torch import save_file

    save_file(distinct_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    config = getattr(model, "config", None)
    (folder / "config.json").write_text(json.dumps(config.to_dict() if config else {}, indent=2) + "\n")
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer.save(folder)
    torch.save(state, folder / "state.pt")


def distinct_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each storage once: a head tied to the embedding is left out, as transformers does."""
    seen: set[int] = set()
    weights = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel() == 0 or tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            weights[name] = tensor.detach().contiguous()
    return weights


def complete(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints under `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(re.fullmatch(r"step-(\d+)", p.name), p) for p in folder.iterdir()]
    return sorted((int(m.group(1)), p) for m, p in found if m)


def load(folder: Path) -> Checkpoint | None:
    """The newest checkpoint under `folder`, or None when there is none.

    Raises Sparse24Error when it is truncated, corrupt, or of another version. Nothing in it can run code.
    """
    steps = complete(folder)
    if not steps:
        return None
    path = steps[-1][1]
    from safetensors.torch import load_file

    try:
        weights = load_file(path / "model.safetensors")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        model_config = json.loads((path / "config.json").read_text())
        settings = json.loads((path / "settings.json").read_text())
    except Exception as e:  # safetensors, zip and pickle readers each have their own
        reason = (str(e).splitlines() or ["no detail"])[0]
        raise Sparse24Error(
            f"checkpoint {path} cannot be read ({type(e).__name__}: {reason}); "
            f"it is truncated or corrupt: restore it from a copy, or start anew with --overwrite"
        ) from e
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        version = state.get("version") if isinstance(state, dict) else None
        raise Sparse24Error(
            f"checkpoint {path} has state version {version}, this sparse24 reads {STATE_VERSION}; go on with the "
            f"sparse24 that wrote it"
        )
    return Checkpoint(path, weights, state, model_config, settings)


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the weights in; shapes and names are compared first, so that a refused checkpoint changes nothing."""
    have = distinct_weights(model)
    problems = [f"{n}: the checkpoint lacks it" for n in have if n not in checkpoint.weights]
    problems += [f"{n}: the model lacks it" for n in checkpoint.weights if n not in have]
    problems += [
        f"{n}: shape {tuple(checkpoint.weights[n].shape)}, the model has {tuple(t.shape)}"
        for n, t in have.items()
        if n in checkpoint.weights and checkpoint.weights[n].shape != t.shape
    ]
    if problems:
        raise Sparse24Error(
            f"checkpoint {checkpoint.path} is of another model ({len(problems)} differences, first {problems[0]}); "
            f"give the options it was made with, or another --out"
        )
    model.load_state_dict(checkpoint.weights, strict=False)  # not strict: tied names were left out
