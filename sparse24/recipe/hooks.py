"""The hooks of a recipe, and their order around a step:

    pre-hook: masked decay on final gradients -> optimizer's step -> post-hook: count, phase, masks, packing

With a closure, gradients exist only once it has run, so the decay is added right after it. Wrappers that move weights
between steps (SAM's first_step, Lookahead's step, Schedule-Free's eval and train) are followed by a packing.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch

from ..layers.parallel import sharding
from ..layers.watch.optimizer_steps import outside_of_backward
from ..layers.watch.unseen import seems_packed
from .capture import Capture, is_capturing
from .loads import LoadWatch
from .steps import Steps
from .writes import WriteWatch, watch_other_optimizers

#: methods of optimizers and their wrappers, other than the hooked step, that may move weights
MOVERS = ("step", "first_step", "second_step", "ascent_step", "descent_step", "eval", "train", "sync_lookahead")
#: those of MOVERS that end a training step
ENDS = ("step", "second_step", "descent_step")
#: packages whose wrappers only pass calls on
PLAIN_WRAPPERS = ("accelerate", "lightning", "pytorch_lightning")


class StepHooks:
    """Registers a recipe with its optimizer, and with the wrappers around it.

    chain  [outermost wrapper, ..., the optimizer whose step is counted], from `optimizers.chain_of`
    keep   the recipe: it stays alive as long as the optimizer has the hooks, even if the user drops it
    """

    def __init__(self, chain: list, steps: Steps, capture: Capture, *, keep: object):
        self.steps, self.capture = steps, capture
        self.keep = keep
        self.optimizer: torch.optim.Optimizer = chain[-1]
        self._chain = chain
        self._in_step, self._in_movers = False, 0
        self._step_shows = False  # on the stack: not if it was compiled
        self._taken = 0  # when the step that runs began
        self._writes = WriteWatch(steps.layers)
        self._loads = LoadWatch(self.optimizer, steps)
        watch_other_optimizers(self)
        # A compiled optimizer.step() would otherwise trace the hooks' work on the host, layer by layer.
        self._handles = [
            self.optimizer.register_step_pre_hook(torch.compiler.disable(self._before)),
            self.optimizer.register_step_post_hook(torch.compiler.disable(self._after)),
            self._loads.handle,
        ]
        self._movers = [
            _Mover(one, name, self)
            for one in chain
            if type(one).__module__.partition(".")[0] not in PLAIN_WRAPPERS
            for name in MOVERS
            if callable(getattr(one, name, None)) and not (one is self.optimizer and name == "step")
        ]

    def remove(self) -> None:
        for handle in (*self._handles, *self._movers):
            handle.remove()
        self._handles, self._movers = [], []
        self.keep = None  # recipe and hooks hold one another: let memory go without the garbage collector

    def __bool__(self) -> bool:
        """Whether they are still registered."""
        return bool(self._handles)

    def _before(self, optimizer, args, kwargs):
        self._in_step, self._step_shows = True, _is_on_the_stack(optimizer)
        if is_capturing():
            self.capture.check(optimizer)
        else:
            self.steps.finish_begun(compare=False)
            self._loads.before_step()
        self._taken = self.steps.taken
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._look_for_writes()
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
        self._in_step = False
        if is_capturing():
            self.capture.record()
            self.steps.begun = False
        else:
            self.steps.step_is_over()
            if self.steps.taken == self._taken:  # else a hook before this one has asked for a state, which finished it
                self.steps.after()
            self._writes.after_step(self.steps.taken)

    def _look_for_writes(self) -> None:
        if not self._in_movers and not is_capturing():  # SAM has put its weights back by now, for one
            self._writes.before_step(self.steps.taken, self.optimizer)

    @contextlib.contextmanager
    def around(self, owner, name: str) -> Iterator[None]:
        """Around a call of one of MOVERS: pack weights that it moved, and warn of steps that are not counted."""
        if name in ENDS:
            self._look_for_writes()
        taken, self._in_movers = self.steps.taken, self._in_movers + 1
        try:
            yield
        finally:
            self._in_movers -= 1
        moved = not is_capturing() and self._pack_moved()
        if moved and name in ENDS and not self._in_movers and taken == self.steps.taken:
            self._writes.warn_of_uncounted(owner, name, self.optimizer)

    def _pack_moved(self) -> bool:
        """Pack if weights have moved. A wrapper may write through `.data`, which only comparing values shows."""
        layers = self.steps.layers.values()
        moved = any(layer.weight_has_changed() for layer in layers) or not all(map(seems_packed, islice(layers, 1)))
        if moved:
            self.steps.repack()
        return moved

    # -- another optimizer's step ---------------------------------------------------------------------------------

    def expects(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step of `optimizer` is part of one that is counted."""
        if self._in_step and self._step_shows and not _is_on_the_stack(self.optimizer):
            self._in_step = False  # it raised: torch has no hook for that
        return self._in_step or self._in_movers > 0 or any(optimizer is one for one in self._chain)

    def other_step(self, layers: list) -> None:
        """Another optimizer has written these layers' weights."""
        if not is_capturing():
            outside_of_backward(partial(self._pack_stepped, layers))

    def _pack_stepped(self, layers: list) -> None:
        if self:
            sharding.reshard(self.steps.sharded)
            self.keep.weights_moved(*layers)


def _is_on_the_stack(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a call of its `step`, as torch has wrapped it for hooks, has begun in this thread and not ended."""
    code, frame = getattr(type(optimizer).step, "__code__", None), sys._getframe()
    while frame is not None:
        if frame.f_code is code and any(one is optimizer for one in frame.f_locals.get("args", ())[:1]):
            return True
        frame = frame.f_back
    return False


class _Mover:
    """Replaces a method of an optimizer: calls it, and packs weights that it moved."""

    def __init__(self, owner, name: str, hooks: StepHooks):
        self._owner, self._name = weakref.ref(owner), name
        self._hooks = weakref.ref(hooks)
        self._own = vars(owner).get(name)  # a learning-rate scheduler, for one, may have replaced the method before
        setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        owner = self._owner()
        call = self._own if self._own is not None else getattr(type(owner), self._name).__get__(owner)
        hooks = self._hooks()
        with contextlib.nullcontext() if hooks is None else hooks.around(owner, self._name):
            return call(*args, **kwargs)

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

    def __reduce__(self):
        return getattr, (self._owner(), self._name)  # pickled, it is the owner's own method, as in a copy

    def __deepcopy__(self, memo):
        # The recipe does not come along with a copied optimizer; nor do the hooks of torch.
        copied = memo.get(id(self._owner()))
        return None if copied is None else getattr(type(copied), self._name).__get__(copied)
