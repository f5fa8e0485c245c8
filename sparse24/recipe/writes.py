"""Weights that something else writes between two steps: the user's own loop, or another optimizer.

Eager forward passes find most writes, and pack (`layers/watch/unseen.py`). The recipe adds three things:

- a step of any other optimizer over the same weights is followed by a packing, for compiled passes do not look;
- in its first two steps all layers compare their first rows in each pass, for writes through `.data`; after that one
  layer does, in every 16th step;
- in the same steps, layers that only compiled passes have used are looked at before the optimizer's step.

The next packing, a step later, makes up for a single write. What matters are loops that write in every step.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Protocol

import torch

from ..errors import Sparse24Warning
from ..layers import SPARSE, SparseLayer
from ..layers.state import state_of
from ..layers.watch.optimizer_steps import after_any_step
from ..layers.watch.unseen import EVERY, look_until_packed, ran_compiled, seems_packed
from .steps import Steps


class WriteWatch:
    """Looks for writes around the steps of a recipe."""

    def __init__(self, layers: dict[str, SparseLayer]):
        self.layers = layers
        self._has_warned = False

    def after_step(self, step: int) -> None:
        """Have the layers that are due compare their first rows in all passes of the next step."""
        for layer in self._due(step):
            if state_of(layer).phase == SPARSE:
                look_until_packed(layer)

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Warn, once, of layers that were written after the last packing and ran compiled since."""
        due = [] if self._has_warned else self._due(step)
        if not due:
            return
        compiled = {name: layer for name, layer in self.layers.items() if ran_compiled(layer)}
        written = [name for name, layer in compiled.items() if layer.weight_has_changed()]
        written = written or [
            name for name, layer in compiled.items() if any(layer is one for one in due) and not seems_packed(layer)
        ]
        if not written:
            return
        self._has_warned = True
        warnings.warn(
            f"the weights of {', '.join(written[:4])} ({len(written)} sparse layers) were written after step {step} of "
            f"{type(optimizer).__name__}, and nobody has packed them since: compiled forward passes do not look, and "
            "multiply with the weights before the write until the next step packs. Call sparse24.refresh(model) after "
            "writing weights. If they are written between backward() and step() this is of no matter",
            Sparse24Warning,
            stacklevel=2,
        )

    def warn_of_uncounted(self, owner, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Warn, once: a wrapper's method has moved weights as a step does, and the counted step did not run in it."""
        if self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"{name}() of {type(owner).__name__} has moved the weights, and step() of {type(optimizer).__name__}, "
            "which this recipe counts, did not run in it: they are packed, but such steps are not counted, get no "
            "masked decay, and no masks are searched. Let it call step(), or make the recipe with the optimizer that "
            "does",
            Sparse24Warning,
            stacklevel=4,
        )

    def _due(self, step: int) -> list[SparseLayer]:
        """The layers to look at after `step`: all at first, since loops that write do so from the start."""
        layers = list(self.layers.values())
        if step < 2 or not layers:
            return layers
        return [] if step % EVERY else [layers[step // EVERY % len(layers)]]


# -- other optimizers -------------------------------------------------------------------------------------------------


class Listener(Protocol):
    """A recipe's hooks, false once they are taken off."""

    steps: Steps

    def __bool__(self) -> bool: ...

    def expects(self, optimizer: torch.optim.Optimizer) -> bool: ...

    def other_step(self, layers: list[SparseLayer]) -> None: ...


_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


def watch_other_optimizers(listener: Listener) -> None:
    """Let `listener` hear of each step of an optimizer that is not its own."""
    after_any_step(_tell_listeners, _listeners)
    _listeners.add(listener)


def _tell_listeners(optimizer: torch.optim.Optimizer, stepped: set[int]) -> None:
    for listener in list(_listeners):
        if listener and not listener.expects(optimizer):
            layers = [la for la in listener.steps.layers.values() if id(la._parameters.get("weight")) in stepped]
            if layers:
                listener.other_step(layers)
