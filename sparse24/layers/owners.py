"""Who trains a layer: at most one recipe, or masked decay would be added twice.

The recipe stands above this room, so layers know it only as something that can be detached.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Protocol


class Owner(Protocol):
    def detach(self) -> None: ...


_owners: weakref.WeakKeyDictionary[object, weakref.ref[Owner]] = weakref.WeakKeyDictionary()


def owner_of(layer) -> Owner | None:
    """The recipe that trains `layer`, if it is still there."""
    return _owners.get(layer, lambda: None)()


def set_owner(layer, owner: Owner) -> None:
    _owners[layer] = weakref.ref(owner)


def forget_owner(layer) -> None:
    _owners.pop(layer, None)


def end_recipes(layers: Iterable) -> None:
    """Detach the recipes of layers that are about to become dense."""
    for layer in layers:
        owner = owner_of(layer)
        if owner is not None:
            owner.detach()
