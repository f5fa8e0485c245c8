"""The hooks of a recipe, and their order around a step:

    pre-hook: masked decay on final gradients -> optimizer's step -> post-hook: count, phase, masks, packing

With a closure, gradients exist only once it has run, so the decay is added right after it. Wrappers that move weights
between steps (SAM's first_step, Lookahead's step, Schedule-Free's eval and train) are followed by a packing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import islice

import torch

from ..layers.unseen import seems_packed
from .capture import Capture, is_capturing
from .steps import Steps

#: methods of optimizers and their wrappers, beside the hooked step, after which weights may be others
MOVERS = ("step", "first_step", "second_step", "ascent_step", "descent_step", "eval", "train", "sync_lookahead")


class StepHooks:
    """Registers a recipe with its optimizer, and with the wrappers around it.

    chain  [outermost wrapper, ..., the optimizer whose step is counted], from `optimizers.chain_of`
    keep   stays alive as long as the optimizer has the hooks: the recipe, which nobody else need hold
    """

    def __init__(self, chain: list, steps: Steps, capture: Capture, *, keep: object):
        self.steps, self.capture = steps, capture
        self.keep = keep
        self.optimizer: torch.optim.Optimizer = chain[-1]
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]
        self._movers = [
            _Mover(one, name, self)
            for one in chain
            for name in MOVERS
            if callable(getattr(one, name, None)) and not (one is self.optimizer and name == "step")
        ]

    def remove(self) -> None:
        for handle in (*self._handles, *self._movers):
            handle.remove()
        self._handles, self._movers = [], []

    def __bool__(self) -> bool:
        """Whether they are still registered."""
        return bool(self._handles)

    def _before(self, optimizer, args, kwargs):
        if is_capturing():
            self.capture.check(optimizer)
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if not callable(closure):
            self.steps.before()
            return None
        closure = self._with_decay(closure)
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": closure}
        return (args[0], closure, *args[2:]), kwargs

    def _with_decay(self, closure: Callable) -> Callable:
        evaluated = False

        def closure_then_decay():
            nonlocal evaluated
            if evaluated:  # LBFGS: the weights have moved since the last evaluation
                self.steps.repack()
            evaluated = True
            loss = closure()
            self.steps.before()
            return loss

        return closure_then_decay

    def _after(self, optimizer, args, kwargs) -> None:
        if is_capturing():
            self.capture.record()
        else:
            self.steps.after()

    def moved(self) -> None:
        """A wrapper may have moved weights, through `.data` perhaps, which only the weights themselves show."""
        if is_capturing():
            return
        layers = self.steps.layers.values()
        if any(layer.weight_has_changed() for layer in layers) or not all(map(seems_packed, islice(layers, 1))):
            self.steps.repack()


class _Mover:
    """Stands in place of a method of an optimizer: calls it, then has moved weights packed."""

    def __init__(self, owner, name: str, hooks: StepHooks):
        self._owner, self._name = weakref.ref(owner), name
        self._hooks = weakref.ref(hooks)
        self._own = vars(owner).get(name)  # what somebody, such as a learning-rate scheduler, has put there before
        setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        owner = self._owner()
        call = self._own if self._own is not None else getattr(type(owner), self._name).__get__(owner)
        result = call(*args, **kwargs)
        if (hooks := self._hooks()) is not None:
            hooks.moved()
        return result

    def __getattr__(self, name):  # schedulers look at __func__, __self__ and names of a bound method
        owner = self.__dict__["_owner"]()
        return getattr(getattr(type(owner), self.__dict__["_name"]).__get__(owner), name)

    def remove(self) -> None:
        owner = self._owner()
        if owner is not None and vars(owner).get(self._name) is self:
            if self._own is None:
                delattr(owner, self._name)
            else:
                setattr(owner, self._name, self._own)

    def __deepcopy__(self, memo):
        # The recipe does not come along with a copied optimizer; nor do the hooks of torch.
        copied = memo.get(id(self._owner()))
        return None if copied is None else getattr(type(copied), self._name).__get__(copied)
