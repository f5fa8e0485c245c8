"""Other models that a Trainer compares its model with: TRL's trainers make a reference before callbacks convert."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import nn
from transformers import Trainer

from ..convert import plain_name, sparse_layers, unwrap
from ..errors import Sparse24Warning


def tell_dense_references(model: nn.Module) -> None:
    """Warn of models of the Trainer that calls this which have the weights of `model` and are dense."""
    trainer = _calling_trainer()
    for name, value in vars(trainer).items() if trainer is not None else ():
        if isinstance(value, nn.Module) and unwrap(value) is not unwrap(model) and _is_dense_twin(value, model):
            warnings.warn(
                f"the {type(trainer).__name__} has a {name} with the weights of its model, and that is dense while the "
                "model is 2:4: they do not begin as the same function, so that DPO's loss does not begin at ln 2. If "
                f"they should, call sparse24.follow(trainer.{name}, like=trainer.model) before trainer.train()",
                Sparse24Warning,
                stacklevel=2,
            )


def _calling_trainer() -> Trainer | None:
    """Callbacks are given the Trainer's parts, and not the Trainer: it is further up among the callers."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    return None


def _is_dense_twin(other: nn.Module, model: nn.Module) -> bool:
    """Whether the weight of the first sparse layer is also in `other`, which has no sparse layers."""
    layers = sparse_layers(model)
    if not layers or sparse_layers(other):
        return False
    name, layer = next(iter(layers.items()))
    twin = {plain_name(own): module for own, module in unwrap(other).named_modules()}.get(name)
    weight, theirs = layer._parameters.get("weight"), getattr(twin, "weight", None)
    if weight is None or theirs is None or weight is theirs or theirs.device != weight.device:
        return False
    return theirs.shape == weight.shape and torch.equal(theirs.detach().to(weight.dtype), weight.detach())
