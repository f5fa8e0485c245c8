"""Which optimizer a recipe hooks into, out of what it was given: the one whose step() changes the sparse weights."""

from __future__ import annotations

import sys
import warnings

import torch

from ..errors import Sparse24Error, Sparse24Warning
from ..layers import SparseLayer
from ..layers.watch.optimizer_steps import parameters_of

#: names under which wrappers keep the optimizer that they wrap
INNER = ("optimizer", "base_optimizer", "_base_optimizer", "base", "_base", "_optimizer")


def chain_of(optimizer, layers: dict[str, SparseLayer]) -> list:
    """[outermost wrapper, ..., the optimizer that is hooked], of the one in `optimizer` that holds the sparse weights.

    optimizer  an optimizer, a wrapper around one (accelerate's, Lightning's, SAM, Lookahead, ...), or several in a list

    Where all sparse weights are frozen no optimizer changes them, and the first one is taken, to count its steps.
    Raises Sparse24Error where none holds a sparse weight, several do, or the one that does never runs its hooks.
    """
    several = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    chains = [_unwrapped(one) for one in several]
    if not chains:
        raise Sparse24Error("optimizer is an empty list; give the optimizer that holds the sparse weights")
    wanted = {id(layer.weight) for layer in layers.values() if layer.weight.requires_grad}
    held = [chain for chain in chains if wanted & parameters_of(chain[-1])] if wanted else chains[:1]
    if len(held) > 1:
        raise Sparse24Error("the sparse weights are spread over several optimizers; give them all to one")
    if not held:
        raise Sparse24Error(
            "no sparse weight that requires a gradient is in the optimizer; was it made for another model, or before "
            "the weights were replaced?"
        )
    left = [name for name, layer in layers.items() if id(layer.weight) in wanted - parameters_of(held[0][-1])]
    if left:
        warnings.warn(
            f"the optimizer does not hold the weights of {', '.join(left[:4])} ({len(left)} sparse layers). If another "
            "one trains them, they get no decay, and their packed form lags a step behind: give all sparse weights to "
            "one optimizer, or call requires_grad_(False) on what is not trained",
            Sparse24Warning,
            stacklevel=4,
        )
    return held[0]


def _unwrapped(optimizer) -> list:
    """From the outermost wrapper to the optimizer to hook: the outermost one whose step() runs its hooks.

    For SAM it is the optimizer inside, although SAM's own hooks run: its steps may be taken by `first_step` and
    `second_step`, and the decay belongs to the gradient of the second, when the weights are back in their place.
    """
    chain = [optimizer]
    while not _runs_hooks(chain[-1]) or _is_sam(chain[-1]):
        inner = _wrapped_by(chain[-1])
        if inner is None or any(inner is one for one in chain):
            break
        chain.append(inner)
    last = chain[-1]
    if not isinstance(last, torch.optim.Optimizer):
        raise Sparse24Error(f"optimizer must be a torch.optim.Optimizer, got {type(last).__name__}")
    if isinstance(optimizer, torch.optim.lr_scheduler.LRScheduler):  # it holds an optimizer, as wrappers do
        raise Sparse24Error(
            f"optimizer must be a torch.optim.Optimizer, got the scheduler {type(optimizer).__name__}; give the "
            "optimizer that it schedules"
        )
    if not _runs_hooks(last):
        raise Sparse24Error(
            f"the step() of {type(last).__name__} runs no hooks, since torch.optim.Optimizer.__init__ was not called: "
            "the recipe would never hear of a step; call super().__init__(params, defaults) in it, or give the recipe "
            "the optimizer inside it"
        )
    return chain


def _runs_hooks(optimizer) -> bool:
    """Whether `Optimizer.__init__` has wrapped step() of its class, and the hooks have a place on the instance."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and getattr(type(optimizer).step, "hooked", False)


def _is_sam(optimizer) -> bool:
    return callable(getattr(optimizer, "first_step", None)) and callable(getattr(optimizer, "second_step", None))


def _wrapped_by(optimizer):
    """The optimizer inside `optimizer` that holds as many of its parameters."""
    own = vars(optimizer) if hasattr(optimizer, "__dict__") else {}
    named = [getattr(optimizer, name, None) for name in INNER]
    for inner in (*named, *own.values()):
        if isinstance(inner, torch.optim.Optimizer) or hasattr(inner, "param_groups"):
            return inner
    return None


def has_skipped(optimizer) -> bool:
    """Whether a fused optimizer, which runs its hooks all the same, has skipped a step: GradScaler found Inf or NaN.

    One read of the device.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) != 0


def only_makes_state(optimizer) -> bool:
    """Whether this is the step by which torch.distributed.checkpoint makes the state of an optimizer that has none: on
    gradients of 0, at a learning rate of 0. That rate alone says nothing, for warm-ups begin with it.
    """
    lr = optimizer.param_groups[0].get("lr") if optimizer.param_groups else None
    if isinstance(lr, torch.Tensor) and lr.device.type != "cpu":
        return False
    frame = sys._getframe(1) if lr is not None and lr == 0 else None
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state":
            return True
        frame = frame.f_back
    return False
