"""Which layers a recipe trains, one recipe for each layer, and warnings about weights that something else writes."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch
from torch import nn

from ..convert import sparse_layers
from ..errors import Sparse24Error, Sparse24Warning
from ..layers import SparseLayer
from ..layers.fused.sparse_activation import activation_blocks
from ..layers.parallel import sharding
from ..layers.watch.owners import owner_of, set_owner

Layers = dict[str, SparseLayer]


def trainable_layers(model: nn.Module) -> Layers:
    """The sparse layers of `model`; raises Sparse24Error where there are none, or their weights are no parameters."""
    sharding.sharded_modules(model)  # refuses FSDP1, whose weights are no parameters of their own
    layers = sparse_layers(model)
    if not layers and activation_blocks(model):
        raise Sparse24Error(
            f"the 2:4 operands of {type(model).__name__} are activations (operand='activation'), which need no recipe: "
            "they are pruned in each pass, and nothing happens between steps; train it as it is"
        )
    if not layers:
        raise Sparse24Error(f"{type(model).__name__} has no sparse layers; call sparse24.sparsify(model) first")
    computed = [name for name, layer in layers.items() if layer._parameters.get("weight") is None]
    if computed:
        raise Sparse24Error(
            f"the weights of {', '.join(computed[:4])} are computed from other parameters (weight_norm, parametrize or "
            "prune), and a recipe decays and packs parameters; remove that, or exclude these layers from sparsify"
        )
    return layers


def take_over(recipe, takeover: bool) -> None:
    """Make `recipe` the owner of its layers. Two recipes would decay twice, so one that is over ends here.

    Raises Sparse24Error for a recipe of the same optimizer that is still in use, unless `takeover`.
    """
    others = {id(other): other for layer in recipe.layers.values() if (other := owner_of(layer)) is not None}
    for other in others.values():
        goes_on = other.optimizer is recipe.optimizer and other.step < other.total_steps
        if goes_on and not takeover:
            raise Sparse24Error(
                f"this model and optimizer have a recipe already, which is at step {other.step} of "
                f"{other.total_steps}; use that one, call its detach() first, or pass takeover=True to put this "
                "one in its place"
            )
        other.detach()
    for layer in recipe.layers.values():
        set_owner(layer, recipe)


def pack_moved(
    layers: Layers, step: int, optimizer: torch.optim.Optimizer, unseen: Collection[nn.Module], *, warn: bool
) -> bool:
    """Pack the layers whose weights were written since they were packed; returns whether it has warned.

    unseen  layers that are known to be written, although neither address nor version of the weight shows it
    warn    name the layers in a warning
    """
    moved = {
        name: layer
        for name, layer in layers.items()
        if any(layer is one for one in unseen) or (layer.weight_has_changed() and not layer.shares_memory())
    }
    for layer in moved.values():
        layer.pack_written()
    if not warn or not moved:
        return False
    warnings.warn(
        f"the weights of {', '.join(list(moved)[:4])} ({len(moved)} sparse layers) were written after step {step} of "
        f"{type(optimizer).__name__}, whose step() this recipe counts, by something that it does not hear of. They are "
        "packed anew, now and whenever this is seen, under the masks of that step. If another optimizer trains them, "
        "its steps are not counted and get no decay: make the recipe with it. If you write them yourself, call "
        "sparse24.refresh(model) afterwards, which compiled models need",
        Sparse24Warning,
        stacklevel=7,
    )
    return True


def warn_of_frozen(layers: Layers) -> None:
    """Warn: a recipe over frozen layers is right under adapters, and a mistake otherwise."""
    warnings.warn(
        f"the weights of all {len(layers)} sparse layers are frozen: their masks and their phase stay, and nothing "
        "decays. If they should be trained, requires_grad_() them, with an optimizer that has them",
        Sparse24Warning,
        stacklevel=4,
    )
