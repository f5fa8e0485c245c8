"""Who trains a layer: at most one recipe, or masked decay would be added twice.

The recipe stands above this room, so layers know it only as something that can be detached.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Protocol

import torch

from ...errors import Sparse24Warning
from ..state import HOLDER, SPARSE, state_of
from .optimizer_steps import after_any_step, outside_of_backward


class Owner(Protocol):
    def detach(self) -> None: ...

    def weights_moved(self, *unseen) -> None: ...

    def model_changed(self) -> None: ...


#: layers that no recipe trains
_alone: weakref.WeakSet[object] = weakref.WeakSet()
_warned: weakref.WeakSet[object] = weakref.WeakSet()
_owners: weakref.WeakKeyDictionary[object, weakref.ref[Owner]] = weakref.WeakKeyDictionary()


def owner_of(layer) -> Owner | None:
    """The recipe that trains `layer`, if it is still there."""
    return _owners.get(layer, lambda: None)()


def set_owner(layer, owner: Owner) -> None:
    this = weakref.ref(layer)
    _owners[layer] = weakref.ref(owner, lambda gone: _owner_is_gone(this(), gone))
    state_of(layer).has_owner = True
    _alone.discard(layer)


def forget_owner(layer) -> None:
    _owners.pop(layer, None)
    if HOLDER in layer.__dict__:  # not dense meanwhile
        state_of(layer).has_owner = False
        watch_steps(layer)


def _owner_is_gone(layer, owner: weakref.ref) -> None:
    if layer is not None and _owners.get(layer) is owner:
        forget_owner(layer)


def watch_steps(layer) -> None:
    """Pack a layer without a recipe after each step of an optimizer over its weight: compiled passes do not look."""
    after_any_step(_pack_stepped, _alone)
    _alone.add(layer)


def _pack_stepped(optimizer: torch.optim.Optimizer, stepped: set[int]) -> None:
    for layer in list(_alone):
        weight = layer._parameters.get("weight")
        if id(weight) not in stepped or HOLDER not in layer.__dict__:
            continue
        state, frozen = state_of(layer), weight.grad is None and not layer.weight_has_changed()
        if frozen or state.stamp is None or state.phase != SPARSE:
            continue
        if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            outside_of_backward(partial(weights_moved, layer, unseen=True))


def weights_moved(layer, *, unseen: bool = False) -> None:
    """A forward pass has found that the weight of `layer` was written since it was packed: pack it, and say so once.

    unseen  the weight does not show it, but its first rows do
    """
    if layer.shares_memory():  # other processes write it, and perhaps nobody has: packing would end graphs that live
        if not layer.is_packed():
            layer.pack_written()
        return
    owner = owner_of(layer)
    if owner is not None:
        owner.weights_moved(*([layer] if unseen else []))
        return
    layer.pack_written()
    if layer in _warned or layer.follows():  # copies of a trained model are written by averages
        return
    _warned.add(layer)
    warnings.warn(
        "the weight of a sparse layer was written since it was packed, and no recipe trains it; it is packed anew now "
        "and whenever this is seen, under its present mask. Train with sparse24.Recipe, or call "
        "sparse24.refresh(model) after writing weights yourself, which compiled models need",
        Sparse24Warning,
        stacklevel=5,
    )


def model_changed(layers: Iterable) -> None:
    """Tell the recipes of `layers` that these were replaced or cast, or that others were converted beside them."""
    for owner in {id(owner): owner for layer in layers if (owner := owner_of(layer)) is not None}.values():
        owner.model_changed()


def end_recipes(layers: Iterable) -> None:
    """Detach the recipes of layers that are about to become dense."""
    for layer in layers:
        owner = owner_of(layer)
        if owner is not None:
            owner.detach()
