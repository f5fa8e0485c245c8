"""Weights that something writes between two steps, and no hook tells of it: another optimizer, or a loop of one's own.

An eager forward pass finds most writes by itself, and packs (`layers/unseen.py`). What is done here:

- a step of any other optimizer over the same weights is followed by a packing, for compiled passes do not look;
- every so many steps one layer is asked to compare its first rows, in its next pass, for writes through `.data`;
- as often, before a step, layers that no eager pass has gone through are looked at: they ran compiled, with what was
  packed.

A write that comes once is over with the next packing, a step later. What matters are loops that write in every step.
"""

from __future__ import annotations

import warnings
import weakref
from functools import cache
from typing import Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import Sparse24Warning
from ..layers.modules import SPARSE, SparseLayer
from ..layers.state import state_of
from ..layers.unseen import look_again, ran_compiled, seems_packed
from .steps import Steps

EVERY = 16  # steps: a comparison waits for the device, and looking at all layers costs the host 3 us each


class WriteWatch:
    """Looks for writes around the steps of a recipe."""

    def __init__(self, layers: dict[str, SparseLayer]):
        self.layers = layers
        self._told = False

    def after_step(self, step: int) -> None:
        """Have one layer compare its first rows in its next training pass."""
        layer = self._in_turn(step)
        if layer is not None and state_of(layer).phase == SPARSE:
            look_again(layer, between_steps=True)

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Tell, once, of layers that were written after the last packing and ran compiled since."""
        if self._told or step % EVERY:
            return
        compiled = {name: la for name, la in self.layers.items() if ran_compiled(la)}
        written = [name for name, layer in compiled.items() if layer.weight_has_changed()]
        layer = self._in_turn(step)
        if layer is not None and not written:
            written = [name for name, la in compiled.items() if la is layer and not seems_packed(la)]
        if not written:
            return
        self._told = True
        warnings.warn(
            f"the weights of {', '.join(written[:4])} ({len(written)} sparse layers) were written after step {step} of "
            f"{type(optimizer).__name__}, and nobody has packed them since: compiled forward passes do not look, and "
            "multiply with the weights before the write until the next step packs. Call sparse24.refresh(model) after "
            "writing weights. If they are written between backward() and step() this is of no matter",
            Sparse24Warning,
            stacklevel=2,
        )

    def tell_uncounted(self, owner, name: str, optimizer: torch.optim.Optimizer) -> None:
        """A wrapper's method has moved weights as a step does, and the step that is counted did not run in it."""
        if self._told:
            return
        self._told = True
        warnings.warn(
            f"{name}() of {type(owner).__name__} has moved the weights, and step() of {type(optimizer).__name__}, "
            "which this recipe counts, did not run in it: they are packed, but such steps are not counted, get no "
            "masked decay, and no masks are searched. Let it call step(), or make the recipe with the optimizer that "
            "does",
            Sparse24Warning,
            stacklevel=4,
        )

    def _in_turn(self, step: int) -> SparseLayer | None:
        if step % EVERY or not self.layers:
            return None
        return list(self.layers.values())[step // EVERY % len(self.layers)]


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
    _register()
    _listeners.add(listener)


@cache
def _register() -> None:
    register_optimizer_step_post_hook(_after_any_step)


def _after_any_step(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    for listener in list(_listeners) if not torch.compiler.is_compiling() else ():
        if listener and not listener.expects(optimizer):
            written = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
            layers = [la for la in listener.steps.layers.values() if id(la._parameters.get("weight")) in written]
            if layers:
                listener.other_step(layers)
