"""Which optimizer a recipe hooks into, out of what it was given."""

from __future__ import annotations

import warnings

import torch

from ..errors import Sparse24Error, Sparse24Warning
from ..layers.modules import SparseLayer


def holding_optimizer(optimizer, layers: dict[str, SparseLayer]) -> torch.optim.Optimizer:
    """The optimizer, of one or several, that holds the sparse weights; unwraps accelerate's and Lightning's.

    Where all sparse weights are frozen, under adapters that are trained, it is the first: its steps are what counts.
    """
    several = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    unwrapped = []
    for one in several:
        while not hasattr(one, "_optimizer_step_pre_hooks") and isinstance(
            inner := getattr(one, "optimizer", None), torch.optim.Optimizer
        ):
            one = inner
        if not isinstance(one, torch.optim.Optimizer):
            raise Sparse24Error(f"optimizer must be a torch.optim.Optimizer, got {type(one).__name__}")
        unwrapped.append(one)
    wanted = {id(layer.weight) for layer in layers.values() if layer.weight.requires_grad}
    if not wanted and unwrapped:
        return unwrapped[0]
    held = [one for one in unwrapped if wanted & {id(p) for group in one.param_groups for p in group["params"]}]
    if len(held) > 1:
        raise Sparse24Error("the sparse weights are spread over several optimizers; give them all to one")
    if not held:
        raise Sparse24Error(
            "no sparse weight that requires a gradient is in the optimizer; was it made for another model, or before "
            "the weights were replaced?"
        )
    in_it = {id(p) for group in held[0].param_groups for p in group["params"]}
    left = [name for name, layer in layers.items() if id(layer.weight) in wanted - in_it]
    if left:
        warnings.warn(
            f"the optimizer does not hold the weights of {', '.join(left[:4])} ({len(left)} sparse layers). If another "
            "one trains them, they get no decay, and their packed form lags a step behind: give all sparse weights to "
            "one optimizer, or call requires_grad_(False) on what is not trained",
            Sparse24Warning,
            stacklevel=3,
        )
    return held[0]
