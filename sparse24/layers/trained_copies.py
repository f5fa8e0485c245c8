"""Which copies are trained: a copy whose weight an optimizer steps is a model of its own, and no average.

Both are written, and gradients are gone once they are zeroed, so the copy itself cannot tell. Optimizers can: torch
calls a hook after the step of any of them. It is registered with the first copy, and looks as long as there are copies.
"""

from __future__ import annotations

import weakref
from functools import cache

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from .state import state_of

#: id of a weight -> the copy that has it
_copies: dict[int, weakref.ref] = {}


def watch_optimizers(layer) -> None:
    """Let `layer`, a copy, follow nobody once an optimizer has stepped its weight."""
    _register()
    weight = layer._parameters.get("weight")
    if weight is not None:
        key = id(weight)
        _copies[key] = weakref.ref(layer, lambda _: _copies.pop(key, None))


@cache
def _register() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    if not _copies or torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if id(weight) in _copies:
                _is_trained(weight)


def _is_trained(weight: torch.Tensor) -> None:
    layer = _copies.pop(id(weight))()
    if layer is None or layer._parameters.get("weight") is not weight or state_of(layer).watch is None:
        return
    state_of(layer).watch.origin = None
