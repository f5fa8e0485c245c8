"""Other models that a Trainer compares its model with: TRL's trainers make a reference before callbacks convert.

DPO's reference is the policy as it was at the start, so that the loss begins at ln 2: a `ref_model` with the policy's
weights gets its masks. Another model with these weights, such as a teacher, may be dense on purpose: it gets a warning.
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch import nn
from transformers import Trainer

from ..convert import plain_name, refresh, sparse_layers, unwrap
from ..errors import Sparse24Error, Sparse24Warning
from ..layers import SPARSE
from ..recipe import follow

REFERENCE = "ref_model"


def take_references(model: nn.Module, *, resumed: bool) -> bool:
    """Make the `ref_model` of the Trainer that calls this 2:4 where it is a dense twin of `model`; warn of other twins.

    resumed  it was one when the run began: by now the model's weights are others, and the masks those of the reference

    Returns whether there is such a reference.
    """
    trainer, found = _calling_trainer(), False
    for name, value in list(vars(trainer).items()) if trainer is not None else ():
        if not isinstance(value, nn.Module) or unwrap(value) is unwrap(model):
            continue
        if name == REFERENCE and not sparse_layers(value) and (resumed or _is_dense_twin(value, model)):
            found = _follow(value, model, resumed)
        if _is_dense_twin(value, model):
            warnings.warn(
                f"the {type(trainer).__name__} has a {name} with the weights of its model, and that is dense while the "
                "model is 2:4: they do not begin as the same function, so that DPO's loss does not begin at ln 2. If "
                f"they should, call sparse24.follow(trainer.{name}, like=trainer.model) before trainer.train()",
                Sparse24Warning,
                stacklevel=2,
            )
    return found


def _follow(reference: nn.Module, model: nn.Module, resumed: bool) -> bool:
    try:
        follow(reference, like=model)
    except Sparse24Error:  # wrapped or quantised, perhaps; the caller warns if it is a dense twin
        return False
    if resumed:
        for layer in sparse_layers(reference).values():
            layer.enter(SPARSE)
        refresh(reference, search=True)  # its weights are those in which the run's first masks were searched
    return True


def _calling_trainer() -> Trainer | None:
    """The Trainer whose callback runs now. Callbacks get its parts but not itself, so it is looked for in the stack."""
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
