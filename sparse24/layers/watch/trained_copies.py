"""Which copies are trained: a copy whose weight an optimizer steps is a model of its own, and no average.

Both are written, and gradients are gone once they are zeroed, so the copy itself cannot tell. Optimizers can: they are
looked at after each step, as long as there are copies.
"""

from __future__ import annotations

import weakref

import torch

from ..state import state_of
from .optimizer_steps import after_any_step

#: id of a weight -> the copy that has it
_copies: dict[int, weakref.ref] = {}


def watch_optimizers(layer) -> None:
    """Let `layer`, a copy, follow nobody once an optimizer has stepped its weight."""
    after_any_step(_stop_following, _copies)
    weight = layer._parameters.get("weight")
    if weight is not None:
        key = id(weight)
        _copies[key] = weakref.ref(layer, lambda _: _copies.pop(key, None))


def _stop_following(optimizer: torch.optim.Optimizer, stepped: set[int]) -> None:
    for key in stepped & _copies.keys():
        layer = _copies.pop(key)()
        if layer is not None and id(layer._parameters.get("weight")) == key and state_of(layer).watch is not None:
            state_of(layer).watch.origin = None
