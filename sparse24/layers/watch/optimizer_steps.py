"""Who wants to hear of every optimizer step: torch has one hook for all optimizers, and it is registered once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

#: (optimizer, ids of its parameters) after a step
Listener = Callable[[torch.optim.Optimizer, set[int]], None]
_listeners: dict[Listener, Collection] = {}


def after_any_step(listener: Listener, concerned: Collection) -> None:
    """Call `listener` after each step of any optimizer, as long as `concerned` is not empty; asked twice, once."""
    _register()
    _listeners.setdefault(listener, concerned)


@cache
def _register() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    if torch.compiler.is_compiling():
        return
    listeners = [listener for listener, concerned in _listeners.items() if concerned]
    if listeners:
        stepped = parameters_of(optimizer)
        for listener in listeners:
            listener(optimizer, stepped)


def outside_of_backward(call: Callable[[], None]) -> None:
    """Call it now or, inside of a backward pass, at its end: an optimizer that steps in hooks of gradients writes
    weights while the pass still reads packed ones.
    """
    if torch._C._current_graph_task_id() == -1:
        call()
    else:
        torch.autograd.Variable._execution_engine.queue_callback(call)


def parameters_of(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of what it trains."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
