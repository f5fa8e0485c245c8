"""Masked decay: how strong it is at a step, where it is added, and the adding.

    gradient += decay * (1 - mask) * weight        or        weight -= lr * decay * (1 - mask) * weight

The second is the form of SR-STE, and the one for Muon. Adam divides the gradient, with the decay in it, by the root of
its second moment, entry by entry. Muon's update does not depend on the scale of the gradient, so the effect of a decay
in the gradient would depend on the units of the loss. Beside the update, where Muon's own weight decay acts, the decay
has no unit: there it is about 1, not 6e-5.
"""

from __future__ import annotations

import math
import warnings
from numbers import Real

import torch
from torch import Tensor

from .. import ops
from ..errors import Sparse24Error, Sparse24Warning
from ..layers import SparseLayer, decay_factor_of, mask_of, packing
from ..layers.parallel import sharding
from .decayed import Decayed
from .methods import Method

SCHEDULES = ("constant", "linear", "cosine")
#: what a decay is, for messages
DECAY = "a finite number that float32 holds, 0 or more"
FLOAT32_MAX = torch.finfo(torch.float32).max
#: where the decay is added to a gradient
DECAY_IN = ("step", "backward")
#: default decay with Muon; in small runs 0.3 to 3 brought mu (`tune.py`) into its range
MUON_DECAY = 1.0


def is_decay(value) -> bool:
    """Whether it is a decay: a number from 0 to the largest of float32."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= FLOAT32_MAX


def check_decay(decay: float) -> float:
    if not is_decay(decay):
        raise Sparse24Error(f"decay must be {DECAY}, got {decay!r}; 0 is plain straight-through")
    return float(decay)


def scheduled_decay(decay: float, schedule: str, progress: float) -> float:
    """The decay factor at `progress` in [0, 1] of the sparse phase.

    constant  the same throughout;  linear  0 rising to `decay`;  cosine  `decay` falling to 0 along half a cosine
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "linear":
        return decay * progress
    if schedule == "cosine":
        return decay * 0.5 * (1 + math.cos(math.pi * progress))
    return decay


def orthogonalizes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is one of the Muon family, recognised by the names of its classes."""
    return any("muon" in cls.__name__.lower() for cls in type(optimizer).__mro__)


def unique_weights(layers: dict[str, SparseLayer]) -> list[SparseLayer]:
    """One layer for each weight: two may share one (allow_tied), whose gradient gets the decay once."""
    return list({id(layer.weight): layer for layer in layers.values()}.values())


class MaskedDecay:
    """The decay of a recipe's layers.

    layers         those that are trained
    on             "gradient", "weight" or None: what the decay is added to
    value          the factor before its schedule; `schedule` and the settings as in `Recipe`
    decay_in       "step": added by `add`, to final gradients or to weights. "backward": backward adds it, multiplied by
                   the float32 [1] that `write` fills and all layers of a device share
    """

    def __init__(
        self,
        layers: dict[str, SparseLayer],
        method: Method,
        value: float,
        *,
        on: str | None,
        schedule: str,
        decay_in: str,
        micro_batches: int,
    ):
        self.layers, self.method, self.on = layers, method, on
        self.schedule, self.decay_in = schedule, decay_in
        self.micro_batches = micro_batches
        self.value = check_decay(value)
        self._written: float | None = None  # what the layers' `decay_factor` holds
        self._decayed, self._has_warned = Decayed(), False
        self._check_place()

    def _check_place(self) -> None:
        if self.decay_in == "step":
            return
        if self.on != "gradient":
            whose = f"method={self.method.name!r}" if self.method.decay_on != "gradient" else "a recipe with Muon"
            raise Sparse24Error(
                f"decay_in='backward' adds the decay to gradients, where {whose} has none; leave decay_in='step'"
            )
        if len(unique_weights(self.layers)) < len(self.layers):
            raise Sparse24Error(
                "decay_in='backward' would decay a weight that several layers share once for each of them; use "
                "decay_in='step'"
            )

    def current(self, progress: float) -> float:
        """The factor at `progress` in [0, 1] of the sparse steps; 0 for methods without decay."""
        return scheduled_decay(self.value, self.schedule, progress) if self.on else 0.0

    # -- in the optimizer's step ------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, optimizer: torch.optim.Optimizer, factor: float, *, retried: bool = False) -> None:
        """Before the step of `optimizer`, on gradients that are final: accumulated, un-scaled (or fused), clipped.

        retried  the step before has not come to its end: it may have failed, and run again on what it has left
        """
        if self.decay_in == "backward":
            _check_not_scaled(optimizer)
            return
        if factor == 0:
            return
        trained = [layer for layer in unique_weights(self.layers) if layer.weight.grad is not None]
        if self.on == "gradient":
            new = [layer for layer in trained if not self._decayed.has(layer.weight.grad)]
            # A fused optimizer un-scales inside its kernel: what is added before must be scaled too.
            gradients = [layer.weight.grad for layer in new]
            _add_to(gradients, new, factor, getattr(optimizer, "grad_scale", None))
            self._decayed.note(gradients)
            self._warn_of_old(trained, new, retried)
        else:
            new = [layer for layer in trained if not (retried and self._decayed.has(layer.weight))]
            _decay_weights(optimizer, new, factor)
            self._decayed.note([layer.weight for layer in new])

    def step_is_over(self) -> None:
        """After the step of the optimizer."""
        if self.on == "gradient":
            self._decayed.step_is_over()

    def _warn_of_old(self, trained: list[SparseLayer], new: list[SparseLayer], retried: bool) -> None:
        """Warn, once, of gradients that a step before has decayed: they were written unseen, or are stepped twice."""
        if retried or self._has_warned or len(new) == len(trained):
            return
        self._has_warned = True
        old = {id(layer) for layer in trained} - {id(layer) for layer in new}
        names = [name for name, layer in self.layers.items() if id(layer) in old]
        warnings.warn(
            f"optimizer.step() runs again on the gradients of {', '.join(names[:4])} ({len(names)} sparse layers) that "
            "nobody has written since the step before: they hold the masked decay of that step, and get no other. If "
            "they are new and were written through .data, which does not show, assign .grad or write it in place",
            Sparse24Warning,
            stacklevel=2,
        )

    # -- in backward --------------------------------------------------------------------------------------------------

    def write(self, factor: float) -> None:
        """Tell backward the decay of the next step. It is read from memory, so that compiled code and CUDA graphs stay
        as they are while it changes; there is nothing to read as long as the decay is 0.
        """
        if self.decay_in == "step":
            return
        factor /= self.micro_batches
        made = {}
        for layer in self.layers.values():
            if decay_factor_of(layer) is None and self.value > 0:
                device = mask_of(layer).device
                if device not in made:
                    made[device] = torch.full((1,), factor, dtype=torch.float32, device=device)
                layer.set_decay(made[device])
        if factor == self._written:
            return
        for tensor in {id(decay_factor_of(layer)): decay_factor_of(layer) for layer in self.layers.values()}.values():
            if tensor is not None:
                tensor.data.fill_(factor)  # .data: autograd may have saved it, and shall see the new value
        self._written = factor

    def is_read(self) -> bool:
        """Whether backward reads a decay from memory."""
        return any(decay_factor_of(layer) is not None for layer in self.layers.values())

    def leave(self) -> None:
        """Stop adding decay in backward."""
        for layer in self.layers.values():
            if isinstance(layer, SparseLayer):
                layer.set_decay(None)


def _check_not_scaled(optimizer: torch.optim.Optimizer) -> None:
    if any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
        raise Sparse24Error(
            "the gradients are scaled by a GradScaler, and decay_in='backward' has added a decay that is not: the "
            "optimizer would un-scale it too; use bfloat16 without a scaler, or decay_in='step'"
        )


def _add_to(targets: list[Tensor], layers: list[SparseLayer], factor: float, scale: Tensor | None) -> None:
    """targets[i] += factor * (1 - mask) * weight of layers[i], times `scale` where given."""
    plain = []
    for layer, target in zip(layers, targets, strict=True):
        if packing.is_dtensor(layer.kernel_weight()):
            sharding.decay_shard(layer, target, factor, scale)
        else:
            plain.append((layer, layer.as_kernel_sees(layer.own_part(target))))
    if plain:
        ops.foreach_masked_decay_(
            [target for _, target in plain],
            [layer.kernel_weight() for layer, _ in plain],
            [packing.mask_bits(mask_of(layer)) for layer, _ in plain],
            factor,
            scale,
        )


def _decay_weights(optimizer: torch.optim.Optimizer, trained: list[SparseLayer], decay: float) -> None:
    """weight -= lr * decay * (1 - mask) * weight, with the learning rate of each weight's own group."""
    found_inf = getattr(optimizer, "found_inf", None)
    keep = None if found_inf is None else 1.0 - (found_inf > 0).float()  # a skipped step must not decay either
    layers = {id(layer.weight): layer for layer in trained}
    for group in optimizer.param_groups:
        chosen = [layers[id(p)] for p in group["params"] if id(p) in layers]
        if chosen:
            terms = [torch.zeros_like(layer.weight) for layer in chosen]
            _add_to(terms, chosen, float(group["lr"]) * decay, keep)
            torch._foreach_sub_([sharding.local(layer.weight) for layer in chosen], [*map(sharding.local, terms)])
