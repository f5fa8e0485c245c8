"""A short text that stands for phase and masks, which decide what function a model computes with its weights.

Store it with weights and compare it when they are loaded: weights under another phase or other masks are another model.
"""

from __future__ import annotations

from torch import nn

from ..convert import sparse_layers
from ..errors import Sparse24Error
from ..layers import DENSE, SPARSE
from ..layers.watch.copies import fingerprint, fingerprint_of_layers, same_function
from .state import phases_of

__all__ = ["fingerprint_of", "fingerprint_of_state", "same_function"]


def fingerprint_of(model: nn.Module) -> str:
    """The fingerprint of a model's sparse layers: "sparse-" or "dense-" and 16 hexadecimal digits over all masks.

    Equal to `recipe.fingerprint()` of its recipe, and to `fingerprint_of_state` of what this saves. Layers in different
    phases, as nothing of sparse24 leaves them, count as sparse. Raises Sparse24Error for a model without sparse layers.
    """
    layers = list(sparse_layers(model).values())
    if not layers:
        raise Sparse24Error(f"{type(model).__name__} has no sparse layers, and so no masks to tell apart")
    return fingerprint_of_layers(layers)


def fingerprint_of_state(state: dict) -> str:
    """The fingerprint of a saved `Recipe.state_dict()`."""
    phase = DENSE if set(phases_of(state).values()) == {DENSE} else SPARSE
    return fingerprint(phase, list(state["masks"].values()), state["scales"])
